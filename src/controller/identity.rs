//! Stable names of a namespace: UUID, NGUID and EUI64, given or derived from what the operator called it.
//!
//! `/dev/disk/by-id` is made of these: the derivation must never change.

use sha2::{Digest, Sha256};

use super::NamespaceConfig;

/// The identifiers of a namespace, big-endian as Identify carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uuid: [u8; 16],
    pub(super) nguid: [u8; 16],
    pub(super) eui64: [u8; 8],
}

impl Identity {
    /// The identifiers of a namespace: those given, the others derived.
    pub(super) fn of(config: &NamespaceConfig) -> Self {
        Self::derived(&config.identity).with(config.uuid, config.nguid, config.eui64)
    }

    fn with(self, uuid: Option<[u8; 16]>, nguid: Option<[u8; 16]>, eui64: Option<[u8; 8]>) -> Self {
        Self {
            uuid: uuid.unwrap_or(self.uuid),
            nguid: nguid.unwrap_or(self.nguid),
            eui64: eui64.unwrap_or(self.eui64),
        }
    }

    /// Identifiers that depend on nothing but `identity`.
    pub(super) fn derived(identity: &str) -> Self {
        let [uuid, nguid, eui] = ["uuid", "nguid", "eui64"].map(|kind| digest(kind, identity));
        let [mut uuid, mut nguid] = [uuid, nguid].map(half);
        // UUID version 8 (RFC 9562: contents of the maker's choice), variant 10b.
        uuid[6] = uuid[6] & 0x0F | 0x80;
        uuid[8] = uuid[8] & 0x3F | 0x80;
        // NGUID bytes 8 to 10 and EUI64 bytes 0 to 2 are an OUI. We have none: say "locally administered".
        nguid[8] = local(nguid[8]);
        let [mut first, b, c, d, e, f, g, h, ..] = eui;
        first = local(first);
        Self {
            uuid,
            nguid,
            eui64: [first, b, c, d, e, f, g, h],
        }
    }
}

/// An OUI's first byte with the individual/group bit clear and the universal/local bit set.
fn local(byte: u8) -> u8 {
    byte & 0xFC | 0x02
}

fn half(digest: [u8; 32]) -> [u8; 16] {
    let mut out = [0; 16];
    for (to, from) in out.iter_mut().zip(digest) {
        *to = from;
    }
    out
}

fn digest(kind: &str, identity: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"vhost-user-nvme 1 namespace ");
    hash.update(kind.as_bytes());
    hash.update([0]);
    hash.update(identity.as_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn derived_identifiers_never_change() {
        let id = Identity::derived("vm1/disk0");
        assert_eq!(hex(&id.uuid), GOLDEN[0]);
        assert_eq!(hex(&id.nguid), GOLDEN[1]);
        assert_eq!(hex(&id.eui64), GOLDEN[2]);
    }

    const GOLDEN: [&str; 3] = [
        "991f4fa1fbc68f99b2d6a7023037e06e",
        "6673deba91f49c85926fbaa9fb025e93",
        "c21b100fbc1e47c7",
    ];

    #[test]
    fn derived_identifiers_have_the_shapes_of_their_kind_and_differ() {
        let mut seen = std::collections::HashSet::new();
        for n in 0..200 {
            let id = Identity::derived(&format!("disk {n}"));
            assert_eq!(id.uuid[6] >> 4, 8, "version");
            assert_eq!(id.uuid[8] >> 6, 2, "variant");
            assert_eq!((id.nguid[8] & 3, id.eui64[0] & 3), (2, 2), "local OUI");
            assert!(seen.insert(id.uuid) && seen.insert(id.nguid));
            let mut eui = [0; 16];
            eui[..8].copy_from_slice(&id.eui64);
            assert!(seen.insert(eui));
        }
    }

    #[test]
    fn given_identifiers_win() {
        let id = Identity::derived("x").with(Some([1; 16]), None, Some([3; 8]));
        assert_eq!((id.uuid, id.eui64), ([1; 16], [3; 8]));
        assert_eq!(id.nguid, Identity::derived("x").nguid);
    }
}
