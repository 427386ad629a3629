//! Data structures of the Identify command.
//!
//! NVMe Base 2.x, section "Identify command"; NVM Command Set 1.x, section "Identify Command". Every
//! structure is 4096 bytes on the wire; those that are lists or descriptors say how they fill it.

mod caps;
mod controller;
mod lists;
mod namespace;
mod nvm;

pub use caps::*;
pub use controller::*;
pub use lists::*;
pub use namespace::*;
pub use nvm::*;

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Bytes of every Identify data structure.
pub const IDENTIFY_LEN: usize = 4096;

open_enum! {
    /// Controller or Namespace Structure: what Identify asks for (Base, figure "Identify – CNS
    /// Values").
    Cns: u8 {
        /// Identify Namespace, NVM Command Set: [`IdentifyNamespace`].
        NAMESPACE = 0x00,
        /// [`IdentifyController`].
        CONTROLLER = 0x01,
        /// [`NamespaceList`] of active namespaces.
        ACTIVE_NAMESPACES = 0x02,
        /// Namespace Identification Descriptors; see [`NamespaceIdDescriptor`].
        NAMESPACE_ID_DESCRIPTORS = 0x03,
        /// NVM Set List.
        NVM_SETS = 0x04,
        /// I/O command set specific Identify Namespace; for NVM [`NvmNamespaceIdentify`].
        CSI_NAMESPACE = 0x05,
        /// I/O command set specific Identify Controller; for NVM [`NvmControllerIdentify`].
        CSI_CONTROLLER = 0x06,
        /// [`NamespaceList`] of active namespaces of one I/O command set.
        CSI_ACTIVE_NAMESPACES = 0x07,
        /// [`IoCommandSetIndependentNamespace`].
        INDEPENDENT_NAMESPACE = 0x08,
        /// Identify Namespace for a user data format (User Data Format index in CDW11).
        NAMESPACE_FOR_FORMAT = 0x09,
        /// I/O command set specific Identify Namespace for a user data format.
        CSI_NAMESPACE_FOR_FORMAT = 0x0A,
        /// [`NamespaceList`] of allocated namespaces.
        ALLOCATED_NAMESPACES = 0x10,
        /// [`IdentifyNamespace`] of an allocated namespace.
        ALLOCATED_NAMESPACE = 0x11,
        /// [`ControllerList`] of controllers a namespace is attached to.
        NAMESPACE_CONTROLLERS = 0x12,
        /// [`ControllerList`] of all controllers of the NVM subsystem.
        SUBSYSTEM_CONTROLLERS = 0x13,
        /// Primary Controller Capabilities.
        PRIMARY_CONTROLLER_CAPABILITIES = 0x14,
        /// Secondary Controller List.
        SECONDARY_CONTROLLERS = 0x15,
        /// Namespace Granularity List.
        NAMESPACE_GRANULARITY = 0x16,
        /// UUID List.
        UUIDS = 0x17,
        /// Domain List.
        DOMAINS = 0x18,
        /// Endurance Group List.
        ENDURANCE_GROUPS = 0x19,
        /// [`NamespaceList`] of allocated namespaces of one I/O command set.
        CSI_ALLOCATED_NAMESPACES = 0x1A,
        /// I/O command set specific Identify Namespace of an allocated namespace.
        CSI_ALLOCATED_NAMESPACE = 0x1B,
        /// [`CommandSetCombinations`].
        IO_COMMAND_SETS = 0x1C,
    }
}

open_enum! {
    /// Command Set Identifier (Base, figure "I/O Command Set Identifiers").
    Csi: u8 {
        /// NVM Command Set.
        NVM = 0x00,
        /// Key Value Command Set.
        KEY_VALUE = 0x01,
        /// Zoned Namespace Command Set.
        ZONED = 0x02,
        /// Subsystem Local Memory Command Set.
        SUBSYSTEM_LOCAL_MEMORY = 0x03,
        /// Computational Programs Command Set.
        COMPUTATIONAL_PROGRAMS = 0x04,
    }
}

/// A 128-bit little-endian counter or capacity, without alignment.
#[derive(
    Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(transparent)]
pub struct Le128([u8; 16]);
layout!(Le128, 16);

impl Le128 {
    /// From a number.
    pub const fn new(value: u128) -> Self {
        Self(value.to_le_bytes())
    }

    /// The number.
    pub const fn get(self) -> u128 {
        u128::from_le_bytes(self.0)
    }

    /// Replaces the number.
    pub const fn set(&mut self, value: u128) {
        self.0 = value.to_le_bytes();
    }
}

impl From<u128> for Le128 {
    fn from(value: u128) -> Self {
        Self::new(value)
    }
}

impl core::fmt::Debug for Le128 {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(&self.get(), f)
    }
}

/// An ASCII string field (serial number, model number, firmware revision) from `text`: left-justified,
/// padded with spaces, cut at `N` (Base, section "Identify Controller", ASCII strings).
///
/// Bytes outside 20h..7Eh become `?`: such a field must never carry control characters to a host.
pub fn ascii<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = if matches!(from, 0x20..=0x7E) {
            from
        } else {
            b'?'
        };
    }
    field
}

/// The text of an ASCII string field, without the padding; `None` if it is not ASCII.
pub fn ascii_text(field: &[u8]) -> Option<&str> {
    if !field.is_ascii() {
        return None;
    }
    let text = core::str::from_utf8(field).ok()?;
    Some(text.trim_end_matches([' ', '\0']))
}

/// A NUL-terminated UTF-8 field (SUBNQN) from `text`: padded with NULs. Text that does not leave room
/// for a NUL is cut at a character boundary.
pub fn utf8<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut end = text.len().min(N.saturating_sub(1));
    while !text.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    for (to, from) in field.iter_mut().zip(text.bytes().take(end)) {
        *to = from;
    }
    field
}

/// The text of a NUL-terminated UTF-8 field; `None` if it is not UTF-8.
pub fn utf8_text(field: &[u8]) -> Option<&str> {
    let text = field.split(|&byte| byte == 0).next()?;
    core::str::from_utf8(text).ok()
}
