//! The two macros that keep the structure modules short: open enums and layout checks.

/// A newtype with named constants: an enum whose unknown values survive.
///
/// Gives `name()`, `ALL`, a `Debug` that prints the name, and the `from_bits`/`into_bits` pair that
/// lets the type stand in a bit field. Two constants with one value are a compile-time warning.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        $Name:ident: $repr:ty {
            $( $(#[$cmeta:meta])* $CONST:ident = $value:expr, )*
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $Name(pub $repr);

        impl $Name {
            $( $(#[$cmeta])* pub const $CONST: Self = Self($value); )*

            /// Every named value, in the order of the specification.
            pub const NAMED: &'static [Self] = &[$(Self::$CONST),*];

            /// The name of this value; `None` when the specification (as known here) has none.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $( Self::$CONST => Some(stringify!($CONST)), )*
                    _ => None,
                }
            }

            /// The value from its bits.
            pub const fn from_bits(bits: $repr) -> Self {
                Self(bits)
            }

            /// The bits of this value.
            pub const fn into_bits(self) -> $repr {
                self.0
            }
        }

        impl core::fmt::Debug for $Name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($Name), "({:#x})"), self.0),
                }
            }
        }
    };
}

/// Asserts at compile time the size of a wire structure and the offsets of the named fields.
macro_rules! layout {
    ($Type:ty, $size:expr $(, $field:ident @ $offset:expr)* $(,)?) => {
        const _: () = {
            assert!(core::mem::size_of::<$Type>() == $size);
            $( assert!(core::mem::offset_of!($Type, $field) == $offset); )*
        };
    };
}

/// `Default` as all zeroes, for structures with arrays too long for `derive(Default)`.
macro_rules! zero_default {
    ($($Type:ty),* $(,)?) => {
        $(
            impl Default for $Type {
                /// All bytes zero.
                fn default() -> Self {
                    zerocopy::FromZeros::new_zeroed()
                }
            }
        )*
    };
}
