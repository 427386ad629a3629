//! A set of opcodes.

/// A set of opcodes of I/O commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opcodes([u64; 4]);

impl Opcodes {
    /// None.
    pub const NONE: Self = Self([0; 4]);

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// Whether `opcode` is one of them.
    pub fn contains(&self, opcode: u8) -> bool {
        let word = self.0.get(usize::from(opcode / 64));
        word.is_some_and(|word| word & (1 << (opcode % 64)) != 0)
    }

    /// All of them, ascending.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(move |opcode| self.contains(*opcode))
    }
}

impl FromIterator<u8> for Opcodes {
    fn from_iter<T: IntoIterator<Item = u8>>(opcodes: T) -> Self {
        let mut set = Self::NONE;
        for opcode in opcodes {
            if let Some(word) = set.0.get_mut(usize::from(opcode / 64)) {
                *word |= 1 << (opcode % 64);
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_is_in_and_nothing_else() {
        let set: Opcodes = [0x04, 0x80, 0xFF, 0x04].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [0x04, 0x80, 0xFF]);
        assert!(!set.is_empty() && Opcodes::NONE.is_empty() && !Opcodes::NONE.contains(0));
    }
}
