//! Lists Identify returns: namespaces, controllers, command sets, identification descriptors.

use super::Csi;
use super::IDENTIFY_LEN;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Namespace List: up to 1024 NSIDs in increasing order, the rest 0 (Base, section "Namespace List").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceList(pub [u32; 1024]);
zero_default!(NamespaceList);
layout!(NamespaceList, 4096);

impl NamespaceList {
    /// A list of the NSIDs greater than `after`, taken from NSIDs in increasing order; those beyond
    /// the 1024th are left out, the host asks again from there.
    pub fn from_ids(after: u32, nsids: impl IntoIterator<Item = u32>) -> Self {
        let mut list = Self::default();
        let listed = nsids.into_iter().filter(|&nsid| nsid > after);
        for (entry, nsid) in list.0.iter_mut().zip(listed) {
            *entry = nsid;
        }
        list
    }

    /// The NSIDs in the list, up to the first 0.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied().take_while(|&nsid| nsid != 0)
    }
}

/// Controller List: a count and up to 2047 controller identifiers in increasing order (Base, section
/// "Controller List").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ControllerList {
    /// Number of Identifiers.
    pub num: u16,
    /// Controller identifiers.
    pub ids: [u16; 2047],
}
zero_default!(ControllerList);
layout!(ControllerList, 4096, ids @ 2);

impl ControllerList {
    /// A list of the controllers from `from` on, taken from identifiers in increasing order.
    pub fn from_ids(from: u16, cntlids: impl IntoIterator<Item = u16>) -> Self {
        let mut list = Self::default();
        let listed = cntlids.into_iter().filter(|&cntlid| cntlid >= from);
        for (entry, cntlid) in list.ids.iter_mut().zip(listed) {
            *entry = cntlid;
            list.num = list.num.saturating_add(1);
        }
        list
    }
}

/// Identify I/O Command Set data structure, CNS 1Ch: 512 combinations, each a bit mask of command
/// sets that can be enabled together, at the bit of their [`Csi`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CommandSetCombinations(pub [u64; 512]);
zero_default!(CommandSetCombinations);
layout!(CommandSetCombinations, 4096);

impl CommandSetCombinations {
    /// The one combination of a controller with the NVM Command Set only.
    pub fn nvm_only() -> Self {
        let mut sets = Self::default();
        if let Some(first) = sets.0.first_mut() {
            *first = 1 << Csi::NVM.0;
        }
        sets
    }
}

open_enum! {
    /// Namespace Identifier Type of an identification descriptor.
    NamespaceIdType: u8 {
        /// IEEE Extended Unique Identifier, 8 bytes.
        EUI64 = 1,
        /// Namespace Globally Unique Identifier, 16 bytes.
        NGUID = 2,
        /// Namespace UUID, 16 bytes.
        UUID = 3,
        /// Command Set Identifier, 1 byte.
        CSI = 4,
    }
}

impl NamespaceIdType {
    /// Bytes of an identifier of this type; `None` for an unknown type.
    pub const fn id_len(self) -> Option<u8> {
        match self {
            Self::EUI64 => Some(8),
            Self::NGUID | Self::UUID => Some(16),
            Self::CSI => Some(1),
            _ => None,
        }
    }
}

/// Header of a Namespace Identification Descriptor, followed by `nidl` bytes of identifier (Base,
/// figure "Identify – Namespace Identification Descriptor").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NamespaceIdDescriptor {
    /// Namespace Identifier Type.
    pub nidt: NamespaceIdType,
    /// Namespace Identifier Length, in bytes, without this header.
    pub nidl: u8,
    /// Reserved.
    pub rsvd2: [u8; 2],
}
layout!(NamespaceIdDescriptor, 4, nidl @ 1);

/// The whole answer to CNS 03h: descriptors one after the other, ended by a type of 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NamespaceIdDescriptors(pub [u8; IDENTIFY_LEN]);
zero_default!(NamespaceIdDescriptors);
layout!(NamespaceIdDescriptors, 4096);

impl NamespaceIdDescriptors {
    /// Descriptors of a namespace: its identifiers as far as it has them, and its command set.
    pub fn of(
        eui64: Option<[u8; 8]>,
        nguid: Option<[u8; 16]>,
        uuid: Option<[u8; 16]>,
        csi: Csi,
    ) -> Self {
        let mut all = Self::default();
        let mut rest: &mut [u8] = &mut all.0;
        let mut push = |nidt: NamespaceIdType, id: &[u8]| {
            let header = [nidt.0, id.len() as u8, 0, 0];
            let bytes = header.iter().chain(id);
            for (to, from) in rest.iter_mut().zip(bytes) {
                *to = *from;
            }
            let used = header.len().saturating_add(id.len());
            rest = core::mem::take(&mut rest)
                .get_mut(used..)
                .unwrap_or_default();
        };
        if let Some(id) = eui64 {
            push(NamespaceIdType::EUI64, &id);
        }
        if let Some(id) = nguid {
            push(NamespaceIdType::NGUID, &id);
        }
        if let Some(id) = uuid {
            push(NamespaceIdType::UUID, &id);
        }
        push(NamespaceIdType::CSI, &[csi.0]);
        all
    }

    /// The descriptors: type and identifier bytes. Ends at the first type of 0, and at a descriptor
    /// that does not fit or has no length.
    pub fn iter(&self) -> impl Iterator<Item = (NamespaceIdType, &[u8])> {
        let mut rest: &[u8] = &self.0;
        core::iter::from_fn(move || {
            let (header, after) = NamespaceIdDescriptor::read_from_prefix(rest).ok()?;
            if header.nidt.0 == 0 || header.nidl == 0 {
                return None;
            }
            let (id, after) = after.split_at_checked(usize::from(header.nidl))?;
            rest = after;
            Some((header.nidt, id))
        })
    }
}
