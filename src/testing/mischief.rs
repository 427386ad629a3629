//! What a hostile SSD does.

/// One thing no SSD may do, or none that is well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// The command is never answered; an Abort ends it.
    Stall,
    /// The command is never answered, and an Abort does not help.
    Deaf,
    /// The command is answered after a while.
    Late,
    /// It is answered twice.
    Twice,
    /// An identifier no command has is answered first.
    UnknownTag,
    /// The answer names another submission queue.
    OtherQueue,
    /// The answer names a head the queue does not have.
    BadHead,
    /// The answer names a head that is one of the queue's, but not the right one.
    OddHead,
    /// The answer has the phase of the round before: nobody sees it.
    WrongPhase,
    /// Any status at all, with data moved or not.
    AnyStatus,
    /// CSTS.CFS.
    Fatal,
    /// The controller is disabled by itself.
    Disable,
    /// All registers read as ones from now on.
    Vanish,
}

impl Act {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Stall,
        Self::Deaf,
        Self::Late,
        Self::Twice,
        Self::UnknownTag,
        Self::OtherQueue,
        Self::BadHead,
        Self::OddHead,
        Self::WrongPhase,
        Self::AnyStatus,
        Self::Fatal,
        Self::Disable,
        Self::Vanish,
    ];

    /// Acts that break no data: a command that is answered was done. And such as an SSD comes back from.
    pub fn fair() -> Vec<Self> {
        let foul = [Self::AnyStatus, Self::Vanish];
        let fair = Self::ALL.into_iter().filter(|act| !foul.contains(act));
        fair.collect()
    }
}

/// Acts and how often they happen.
#[derive(Clone, Debug, Default)]
pub struct Mischief {
    /// An act, and of how many in 10 000 commands it is the fate.
    pub odds: Vec<(Act, u32)>,
    /// Admin commands suffer as well.
    pub admin: bool,
    /// The data and the results of admin commands are noise.
    pub garbage: bool,
}

impl Mischief {
    /// Each of these acts at these odds.
    pub fn of(acts: &[Act], odds: u32) -> Self {
        Self {
            odds: acts.iter().map(|act| (*act, odds)).collect(),
            ..Self::default()
        }
    }

    /// The fate of a command, of a random number.
    pub(super) fn fate(&self, random: u64) -> Option<Act> {
        let mut at = random % 10_000;
        for (act, odds) in &self.odds {
            match at.checked_sub(u64::from(*odds)) {
                None => return Some(*act),
                Some(rest) => at = rest,
            }
        }
        None
    }
}

/// A random number generator (splitmix64): the same numbers for the same seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
