//! The register file: what the guest reads and writes at BAR0 + 0x000 to 0xFFF, on the caller's thread.
//!
//! The guest's own registers (CC, AQA, ASQ, ACQ, the interrupt mask) change here at once; the actor learns of CC by
//! [`Registers::take_cc`]. CSTS is the actor's alone.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use nvme_spec::regs::{Aqa, Cap, Cc, Crto, Csts, Vs, css, offset};

/// Least worst time to become ready (CAP.TO and CRTO): a reset waits for I/O that is out.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// The unit of CAP.TO and CRTO.
const TIMEOUT_UNIT_MS: u128 = 500;

/// The bits of CC that exist here: all but reserved ones and CRIME, which CAP does not offer.
const CC_MASK: u32 = 0x00FF_FFF1;

/// The bits of AQA that exist.
const AQA_MASK: u32 = 0x0FFF_0FFF;

/// The version we answer as.
pub(super) const VERSION: Vs = Vs::V2_0;

/// What the guest has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Host {
    mask: u32,
    cc: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    /// EN has been 0 since the actor looked last.
    disabled: bool,
}

/// The admin queues, as the guest set them up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AdminRegisters {
    pub(super) aqa: Aqa,
    pub(super) asq: u64,
    pub(super) acq: u64,
}

/// The registers of one controller.
pub(super) struct Registers {
    cap: Cap,
    csts: AtomicU32,
    host: Mutex<Host>,
}

impl Registers {
    /// `patience`: how long I/O may be out that is not wanted any more.
    pub(super) fn new(max_queue_entries: u32, doorbell_stride: u8, patience: Duration) -> Self {
        let units = patience.max(READY_TIMEOUT).as_millis();
        let to = u8::try_from(units.div_ceil(TIMEOUT_UNIT_MS)).unwrap_or(u8::MAX);
        let mqes_z = u16::try_from(max_queue_entries.saturating_sub(1)).unwrap_or(u16::MAX);
        let cap = Cap::new()
            .with_mqes_z(mqes_z)
            .with_cqr(true)
            .with_to(to)
            .with_dstrd(doorbell_stride & 0xF)
            .with_css(css::NVM)
            // 2.0 asks for it: we are ready when our media are.
            .with_crms_crwms(true);
        Self {
            cap,
            csts: AtomicU32::new(0),
            host: Mutex::default(),
        }
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        // The value is plain numbers: whoever panicked left a valid one.
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fill `out` with the registers from `at` on.
    pub(super) fn read(&self, at: u32, out: &mut [u8]) {
        let host = *self.host();
        let mut at = u64::from(at);
        for byte in out {
            // A 32-bit register is one atomic load; a read of several is several, as on a bus.
            let dword = u32::try_from(at & !3).map_or(0, |dword| self.dword(&host, dword));
            let [a, b, c, d] = dword.to_le_bytes();
            *byte = match at & 3 {
                0 => a,
                1 => b,
                2 => c,
                _ => d,
            };
            at = at.saturating_add(1);
        }
    }

    fn dword(&self, host: &Host, at: u32) -> u32 {
        const CAP_HIGH: u32 = offset::CAP + 4;
        const ASQ_HIGH: u32 = offset::ASQ + 4;
        const ACQ_HIGH: u32 = offset::ACQ + 4;
        let cap = self.cap.into_bits();
        match at {
            offset::CAP => cap as u32,
            CAP_HIGH => (cap >> 32) as u32,
            offset::VS => VERSION.into_bits(),
            offset::INTMS | offset::INTMC => host.mask,
            offset::CC => host.cc,
            offset::CSTS => self.csts.load(Ordering::Acquire),
            offset::AQA => host.aqa,
            offset::ASQ => host.asq as u32,
            ASQ_HIGH => (host.asq >> 32) as u32,
            offset::ACQ => host.acq as u32,
            ACQ_HIGH => (host.acq >> 32) as u32,
            offset::CRTO => Crto::new().with_crwmt(u16::from(self.cap.to())).into_bits(),
            _ => 0,
        }
    }

    /// A write of the guest; whether anything has changed. Only aligned writes of 4 and 8 bytes reach a register.
    pub(super) fn write(&self, at: u32, bytes: &[u8]) -> bool {
        let mut host = self.host();
        let before = *host;
        match *bytes {
            [a, b, c, d] if at.is_multiple_of(4) => {
                write_dword(&mut host, at, u32::from_le_bytes([a, b, c, d]));
            }
            [a, b, c, d, e, f, g, h] if at.is_multiple_of(8) => {
                write_dword(&mut host, at, u32::from_le_bytes([a, b, c, d]));
                if let Some(at) = at.checked_add(4) {
                    write_dword(&mut host, at, u32::from_le_bytes([e, f, g, h]));
                }
            }
            _ => {}
        }
        *host != before
    }

    /// What the guest has written, to be restored.
    pub(super) fn image(&self) -> Host {
        *self.host()
    }

    /// What a guest had written before.
    pub(super) fn restore(&self, image: Host) {
        *self.host() = Host {
            mask: image.mask,
            cc: image.cc & CC_MASK,
            aqa: image.aqa & AQA_MASK,
            ..image
        };
    }

    /// As if the guest had enabled the controller: a failure that nobody knows the beginning of stays until it is reset.
    pub(super) fn pretend_enabled(&self) {
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        *self.host() = Host {
            cc: cc.into_bits(),
            ..Host::default()
        };
    }

    /// CC as it is now, and whether EN has been 0 since the last call.
    pub(super) fn take_cc(&self) -> (Cc, bool) {
        let mut host = self.host();
        let disabled = std::mem::take(&mut host.disabled);
        (Cc::from_bits(host.cc), disabled)
    }

    /// CC as it is now.
    pub(super) fn cc(&self) -> Cc {
        Cc::from_bits(self.host().cc)
    }

    /// Where the guest has put the admin queues.
    pub(super) fn admin(&self) -> AdminRegisters {
        let host = self.host();
        AdminRegisters {
            aqa: Aqa::from_bits(host.aqa),
            asq: host.asq,
            acq: host.acq,
        }
    }

    /// CSTS.
    pub(super) fn csts(&self) -> Csts {
        Csts::from_bits(self.csts.load(Ordering::Acquire))
    }

    /// Show a new CSTS. Only the actor calls this.
    pub(super) fn set_csts(&self, csts: Csts) {
        self.csts.store(csts.into_bits(), Ordering::Release);
    }

    /// What the guest wrote, back to what it is after power-on.
    pub(super) fn reset(&self) {
        *self.host() = Host::default();
    }
}

fn write_dword(host: &mut Host, at: u32, value: u32) {
    const ASQ_HIGH: u32 = offset::ASQ + 4;
    const ACQ_HIGH: u32 = offset::ACQ + 4;
    const LOW: u64 = 0xFFFF_FFFF;
    let high = u64::from(value) << 32;
    match at {
        offset::INTMS => host.mask |= value,
        offset::INTMC => host.mask &= !value,
        offset::CC => {
            let new = value & CC_MASK;
            host.cc = new;
            host.disabled |= !Cc::from_bits(new).en();
        }
        offset::AQA => host.aqa = value & AQA_MASK,
        offset::ASQ => host.asq = host.asq & !LOW | u64::from(value),
        ASQ_HIGH => host.asq = host.asq & LOW | high,
        offset::ACQ => host.acq = host.acq & !LOW | u64::from(value),
        ACQ_HIGH => host.acq = host.acq & LOW | high,
        // CSTS.NSSRO never is 1, NSSR is not supported (CAP.NSSRS), the rest does not exist.
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::regs::Shn;
    use proptest::prelude::*;

    fn read32(r: &Registers, at: u32) -> u32 {
        let mut out = [0; 4];
        r.read(at, &mut out);
        u32::from_le_bytes(out)
    }

    fn read64(r: &Registers, at: u32) -> u64 {
        let mut out = [0; 8];
        r.read(at, &mut out);
        u64::from_le_bytes(out)
    }

    #[test]
    fn capabilities_say_what_we_do() {
        let r = Registers::new(1024, 2, Duration::ZERO);
        let cap = Cap::from_bits(read64(&r, 0));
        assert_eq!((cap.mqes_z(), cap.cqr(), cap.dstrd()), (1023, true, 2));
        assert_eq!((cap.css(), cap.to(), cap.ams()), (1, 20, 0));
        assert_eq!((cap.mpsmin(), cap.mpsmax(), cap.nssrs()), (0, 0, false));
        assert_eq!(read32(&r, 8), 0x0002_0000);
        assert_eq!(read32(&r, offset::CRTO), 20);
        assert_eq!(read32(&r, 4), (cap.into_bits() >> 32) as u32);
        assert_eq!(
            Cap::from_bits(read64(&Registers::new(65536, 0, Duration::ZERO), 0)).mqes_z(),
            65535
        );
    }

    #[test]
    fn the_time_a_reset_may_take_is_told_in_halves_of_seconds() {
        for (ms, units) in [
            (0, 20),
            (10_001, 21),
            (42_500, 85),
            (127_500, 255),
            (200_000, 255),
        ] {
            let r = Registers::new(64, 0, Duration::from_millis(ms));
            assert_eq!(Cap::from_bits(read64(&r, 0)).to(), units);
            assert_eq!(read32(&r, offset::CRTO), u32::from(units));
        }
    }

    #[test]
    fn queue_addresses_are_written_whole_and_in_halves() {
        let r = Registers::new(64, 0, Duration::ZERO);
        assert!(r.write(offset::ASQ, &0x1234_5678_9abc_d000u64.to_le_bytes()));
        assert!(r.write(offset::ACQ + 4, &7u32.to_le_bytes()));
        assert!(r.write(offset::ACQ, &0x2000u32.to_le_bytes()));
        assert!(!r.write(offset::ACQ, &0x2000u32.to_le_bytes()), "the same");
        assert!(r.write(offset::AQA, &u32::MAX.to_le_bytes()));
        let admin = r.admin();
        assert_eq!(
            (admin.asq, admin.acq),
            (0x1234_5678_9abc_d000, 0x7_0000_2000)
        );
        assert_eq!(read64(&r, offset::ACQ), 0x7_0000_2000);
        assert_eq!((admin.aqa.asqs_z(), admin.aqa.acqs_z()), (4095, 4095));
    }

    #[test]
    fn the_interrupt_mask_is_set_and_cleared_by_ones() {
        let r = Registers::new(64, 0, Duration::ZERO);
        r.write(offset::INTMS, &0xF0u32.to_le_bytes());
        r.write(offset::INTMS, &0x0Fu32.to_le_bytes());
        r.write(offset::INTMC, &0x11u32.to_le_bytes());
        assert_eq!(read32(&r, offset::INTMS), 0xEE);
        assert_eq!(read32(&r, offset::INTMC), 0xEE);
    }

    #[test]
    fn cc_reports_changes_and_remembers_a_short_disable() {
        let r = Registers::new(64, 0, Duration::ZERO);
        let on = Cc::new().with_en(true).into_bits();
        assert!(r.write(offset::CC, &on.to_le_bytes()));
        assert!(!r.write(offset::CC, &on.to_le_bytes()), "the same value");
        assert_eq!(r.take_cc(), (Cc::from_bits(on), false));
        r.write(offset::CC, &0u32.to_le_bytes());
        r.write(offset::CC, &on.to_le_bytes());
        assert_eq!(r.take_cc(), (Cc::from_bits(on), true));
        assert_eq!(r.take_cc(), (Cc::from_bits(on), false));
        // A 64-bit write over INTMC and CC reaches both.
        let both = u64::from(Cc::new().with_shn(Shn::NORMAL).into_bits()) << 32;
        assert!(r.write(offset::INTMC, &both.to_le_bytes()));
        assert_eq!(r.cc().shn(), Shn::NORMAL);
    }

    #[test]
    fn read_only_registers_odd_sizes_and_odd_offsets_are_ignored() {
        let r = Registers::new(64, 0, Duration::ZERO);
        let mut before = [0; 0x100];
        r.read(0, &mut before);
        for at in [offset::CAP, offset::VS, offset::CSTS, offset::NSSR, 0x38] {
            assert!(!r.write(at, &u32::MAX.to_le_bytes()), "{at:#x}");
        }
        assert!(!r.write(offset::CC, &[1]) && !r.write(offset::CC, &[1, 0]));
        assert!(!r.write(offset::CC + 2, &[0xff; 4]) && !r.write(offset::CC, &[1; 8]));
        assert!(!r.write(u32::MAX, &[1; 4]) && !r.write(u32::MAX - 7, &[1; 8]));
        let mut after = [0; 0x100];
        r.read(0, &mut after);
        assert_eq!(before, after);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_defined(
            writes in prop::collection::vec((0u32..0x1010, prop::collection::vec(any::<u8>(), 0..10)), 0..40),
            at in any::<u32>(),
        ) {
            let r = Registers::new(64, 0, Duration::ZERO);
            for (at, bytes) in writes {
                r.write(at, &bytes);
            }
            let mut whole = [0; 0x1000];
            r.read(0, &mut whole);
            let mut byte = [0];
            for (i, expected) in whole.iter().enumerate().take(0x80) {
                r.read(i as u32, &mut byte);
                prop_assert_eq!(byte[0], *expected);
            }
            r.read(at, &mut [0; 16]);
            prop_assert_eq!(r.csts(), Csts::new());
        }
    }
}
