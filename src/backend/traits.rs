//! What an SSD says of itself that its guests are told too.

use nvme_spec::identify::{
    IdentifyController, IdentifyNamespace, NvmControllerIdentify, NvmNamespaceIdentify, Oncs,
};

use super::Opcodes;

/// What a store that is an SSD says beyond its [`Geometry`](super::Geometry). Fields are as in Identify, seen from the guest's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Largest transfer that is one command to it, in bytes: a multiple of 4096.
    pub max_transfer: u32,
    /// What it does of Compare, Verify, Write Zeroes and Dataset Management; nothing else is set.
    pub oncs: Oncs,
    /// Features and sizes: of NSFEAT all but thin provisioning, DLFEAT, atomic units and boundaries, NOIOB, preferred sizes. All else is zero.
    pub namespace: IdentifyNamespace,
    /// Preferred read sizes. All else is zero.
    pub nvm: NvmNamespaceIdentify,
    /// AWUN, AWUPF and ACWU, zero-based.
    pub atomic_z: [u16; 3],
    /// WCTEMP and CCTEMP, in kelvins; 0 = it does not say.
    pub temperatures: [u16; 2],
    /// Commands that go to it unchecked.
    pub pass: Opcodes,
    /// VSL and WZSL, as powers of two in pages of 4096 bytes, DMRL, DMRSL and DMSL. All else is zero.
    pub limits: NvmControllerIdentify,
}

/// What is said of an SSD, for those who make [`Traits`] of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said<'a> {
    pub controller: &'a IdentifyController,
    pub namespace: &'a IdentifyNamespace,
    pub nvm: &'a NvmNamespaceIdentify,
    pub limits: &'a NvmControllerIdentify,
    /// CAP.MPSMIN: the unit of the limits is 2^(12 + this) bytes.
    pub mpsmin: u8,
    /// Largest transfer in bytes.
    pub max_transfer: u32,
    /// First block of the guest's namespace in the SSD's.
    pub first: u64,
    pub pass: Opcodes,
}

impl Traits {
    /// What a guest is told of blocks of this SSD.
    pub(super) fn of(said: &Said<'_>) -> Self {
        let (c, n) = (said.controller, said.namespace);
        let first = said.first;
        // Boundaries and alignments are counted from the SSD's first block; a guest counts from its own.
        let aligned = |blocks: u64| blocks != 0 && first.is_multiple_of(blocks);
        let noiob = match aligned(n.noiob.into()) {
            true => n.noiob,
            false => 0,
        };
        let boundary = |blocks: u16| blocks == 0 || aligned(u64::from(blocks) + 1);
        // Where we cut a write in two, it is two.
        let whole = n.noiob == 0 && boundary(n.nabsn) && boundary(n.nabspf);
        let preferred = n.nsfeat.optperf()
            && aligned(u64::from(n.npwa_z) + 1)
            && aligned(u64::from(n.npda_z) + 1);
        let read = n.nsfeat.optrperf() && (said.nvm.npra == 0 || aligned(u64::from(said.nvm.npra)));
        let mut namespace = IdentifyNamespace {
            dlfeat: n.dlfeat,
            noiob,
            ..IdentifyNamespace::default()
        };
        namespace.nsfeat = namespace
            .nsfeat
            .with_atomic(n.nsfeat.atomic() || !whole)
            .with_dealloc_error(n.nsfeat.dealloc_error())
            .with_optperf(preferred)
            .with_optrperf(read);
        if n.nsfeat.atomic() && whole {
            namespace.nawun_z = n.nawun_z;
            namespace.nawupf_z = n.nawupf_z;
            namespace.nabsn = n.nabsn;
            namespace.nabo = n.nabo;
            namespace.nabspf = n.nabspf;
        }
        if preferred {
            namespace.npwg_z = n.npwg_z;
            namespace.npwa_z = n.npwa_z;
            namespace.npdg_z = n.npdg_z;
            namespace.npda_z = n.npda_z;
            namespace.nows_z = n.nows_z;
        }
        let mut nvm = NvmNamespaceIdentify::default();
        if read {
            nvm.nprg = said.nvm.nprg;
            nvm.npra = said.nvm.npra;
            nvm.nors = said.nvm.nors;
        }
        let atomic_z = match whole {
            true => [c.awun_z, c.awupf_z, c.acwu_z],
            false => [0; 3],
        };
        Self {
            max_transfer: said.max_transfer,
            oncs: Oncs::new()
                .with_compare(c.oncs.compare())
                .with_verify(c.oncs.verify())
                .with_write_zeroes(c.oncs.write_zeroes())
                .with_dataset_management(c.oncs.dataset_management()),
            namespace,
            nvm,
            temperatures: [c.wctemp, c.cctemp],
            pass: said.pass,
            atomic_z,
            limits: NvmControllerIdentify {
                vsl: pages(said.limits.vsl, said.mpsmin),
                wzsl: pages(said.limits.wzsl, said.mpsmin),
                dmrl: said.limits.dmrl,
                dmrsl: said.limits.dmrsl,
                dmsl: said.limits.dmsl,
                ..NvmControllerIdentify::default()
            },
        }
    }
}

/// A limit in units of the SSD's smallest page, in pages of 4096 bytes; 0 is none.
fn pages(power: u8, mpsmin: u8) -> u8 {
    match power {
        0 => 0,
        power => power.saturating_add(mpsmin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::identify::{DeallocatedRead, Dlfeat, Nsfeat};

    fn of(first: u64, change: impl Fn(&mut IdentifyNamespace)) -> Traits {
        let controller = IdentifyController {
            oncs: Oncs::from_bits(0xFFFF),
            awun_z: 15,
            awupf_z: 7,
            wctemp: 350,
            ..IdentifyController::default()
        };
        let mut namespace = IdentifyNamespace {
            nsze: 1 << 30,
            nsfeat: Nsfeat::from_bits(0xFF),
            dlfeat: Dlfeat::new().with_read(DeallocatedRead::ZEROES),
            nawun_z: 31,
            nawupf_z: 15,
            npwg_z: 7,
            npwa_z: 7,
            npdg_z: 63,
            npda_z: 15,
            nows_z: 255,
            nguid: [1; 16],
            ..IdentifyNamespace::default()
        };
        change(&mut namespace);
        let nvm = NvmNamespaceIdentify {
            nprg: 8,
            npra: 8,
            nors: 64,
            lbstm: 5,
            ..NvmNamespaceIdentify::default()
        };
        let limits = NvmControllerIdentify {
            vsl: 3,
            dmrsl: 100,
            dmrl: 9,
            wzdsl: 7,
            ..NvmControllerIdentify::default()
        };
        Traits::of(&Said {
            controller: &controller,
            namespace: &namespace,
            nvm: &nvm,
            limits: &limits,
            mpsmin: 2,
            max_transfer: 1 << 17,
            first,
            pass: Opcodes::NONE,
        })
    }

    #[test]
    fn a_whole_namespace_is_told_as_it_is() {
        let t = of(0, |_| {});
        assert_eq!(t.oncs.into_bits(), 0b1000_1101, "no more than is forwarded");
        let n = &t.namespace;
        assert_eq!(
            (n.nawun_z, n.nawupf_z, n.npwg_z, n.nows_z),
            (31, 15, 7, 255)
        );
        assert!(n.nsfeat.atomic() && n.nsfeat.optperf() && n.nsfeat.dealloc_error());
        assert!(!n.nsfeat.thin() && !n.nsfeat.optperf_large() && !n.nsfeat.multi_atomicity());
        assert_eq!(n.dlfeat.read(), DeallocatedRead::ZEROES);
        assert_eq!((n.nsze, n.nguid), (0, [0; 16]), "names and sizes are ours");
        assert_eq!((t.nvm.nors, t.nvm.lbstm), (64, 0));
        assert_eq!((t.atomic_z, t.temperatures), ([15, 7, 0], [350, 0]));
        assert_eq!((t.limits.vsl, t.limits.wzsl, t.limits.dmrl), (5, 0, 9));
        assert_eq!(t.limits.wzdsl, 0, "no more than is heeded");
    }

    #[test]
    fn a_part_is_told_what_holds_from_its_own_start() {
        // Aligned to all there is.
        assert_eq!(of(1 << 20, |n| n.noiob = 256).namespace.noiob, 256);
        assert_eq!(of(1 << 20, |_| {}).namespace.nows_z, 255);
        let t = of(100, |n| n.noiob = 256);
        assert_eq!(t.namespace.noiob, 0, "its boundaries are elsewhere");
        assert!(!t.namespace.nsfeat.optperf() && !t.namespace.nsfeat.optrperf());
        assert_eq!((t.namespace.npwg_z, t.nvm.nprg), (0, 0));
        // Where writes are cut, no more than a block is atomic.
        for t in [t, of(0, |n| n.noiob = 256), of(100, |n| n.nabsn = 63)] {
            assert!(t.namespace.nsfeat.atomic());
            assert_eq!((t.atomic_z, t.namespace.nawun_z), ([0; 3], 0));
        }
        let t = of(128, |n| (n.nabsn, n.nabo) = (63, 5));
        assert_eq!(
            (t.namespace.nawun_z, t.namespace.nabsn, t.namespace.nabo),
            (31, 63, 5)
        );
    }
}
