//! Identify Controller (CNS 01h) and the power state descriptor.

use super::Cmic;
use super::ControllerType;
use super::Ctratt;
use super::EntrySize;
use super::Fna;
use super::Frmw;
use super::Fuses;
use super::Le128;
use super::Lpa;
use super::Nwpc;
use super::Oacs;
use super::Oaes;
use super::Oncs;
use super::Sgls;
use super::Vwc;
use crate::regs::Vs;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Power State Descriptor, 32 bytes (Base, figure "Identify – Power State Descriptor Data
/// Structure").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PowerState {
    /// Maximum Power, in 0.01 W (or 0.0001 W when `flags` bit 0 is set).
    pub mp: u16,
    /// Reserved.
    pub rsvd2: u8,
    /// Bit 0 Max Power Scale, bit 1 Non-Operational State.
    pub flags: u8,
    /// Entry Latency, in microseconds.
    pub enlat: u32,
    /// Exit Latency, in microseconds.
    pub exlat: u32,
    /// Relative Read Throughput, bits 4:0; lower is better.
    pub rrt: u8,
    /// Relative Read Latency, bits 4:0.
    pub rrl: u8,
    /// Relative Write Throughput, bits 4:0.
    pub rwt: u8,
    /// Relative Write Latency, bits 4:0.
    pub rwl: u8,
    /// Idle Power.
    pub idlp: u16,
    /// Idle Power Scale, bits 7:6.
    pub ips: u8,
    /// Reserved.
    pub rsvd19: u8,
    /// Active Power.
    pub actp: u16,
    /// Active Power Workload, bits 2:0; Active Power Scale, bits 7:6.
    pub apws: u8,
    /// Emergency Power Fail Recovery Time.
    pub epfrt: u8,
    /// Forced Quiescence Vault Time.
    pub fqvt: u8,
    /// Emergency Power Fail Vault Time.
    pub epfvt: u8,
    /// Time scales of EPFRT (bits 3:0) and FQVT (bits 7:4).
    pub epfr_fqv_ts: u8,
    /// Time scale of EPFVT, bits 3:0.
    pub epfvts: u8,
    /// Reserved.
    pub rsvd28: [u8; 4],
}
layout!(PowerState, 32, flags @ 3, enlat @ 4, exlat @ 8, rrt @ 12, idlp @ 16, ips @ 18,
    actp @ 20, apws @ 22, epfrt @ 23, rsvd28 @ 28);

/// Identify Controller, 4096 bytes (Base, figure "Identify – Identify Controller Data Structure, I/O
/// Command Set Independent").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyController {
    /// PCI Vendor ID.
    pub vid: u16,
    /// PCI Subsystem Vendor ID.
    pub ssvid: u16,
    /// Serial Number, ASCII; see [`super::ascii`].
    pub sn: [u8; 20],
    /// Model Number, ASCII.
    pub mn: [u8; 40],
    /// Firmware Revision, ASCII.
    pub fr: [u8; 8],
    /// Recommended Arbitration Burst, as a power of two.
    pub rab: u8,
    /// IEEE OUI Identifier, least significant byte first.
    pub ieee: [u8; 3],
    /// Controller Multi-Path I/O and Namespace Sharing Capabilities.
    pub cmic: Cmic,
    /// Maximum Data Transfer Size: 2^MDTS units of the minimum memory page size; 0 for no limit.
    pub mdts: u8,
    /// Controller ID.
    pub cntlid: u16,
    /// Version.
    pub ver: Vs,
    /// RTD3 Resume Latency, in microseconds.
    pub rtd3r: u32,
    /// RTD3 Entry Latency, in microseconds.
    pub rtd3e: u32,
    /// Optional Asynchronous Events Supported.
    pub oaes: Oaes,
    /// Controller Attributes.
    pub ctratt: Ctratt,
    /// Read Recovery Levels Supported.
    pub rrls: u16,
    /// Boot Partition Capabilities.
    pub bpcap: u8,
    /// Reserved.
    pub rsvd103: u8,
    /// NVM Subsystem Shutdown Latency, in microseconds.
    pub nssl: u32,
    /// Reserved.
    pub rsvd108: [u8; 2],
    /// Power Loss Signaling Information.
    pub plsi: u8,
    /// Controller Type.
    pub cntrltype: ControllerType,
    /// FRU Globally Unique Identifier.
    pub fguid: [u8; 16],
    /// Command Retry Delay Time 1, in units of 100 ms.
    pub crdt1: u16,
    /// Command Retry Delay Time 2, in units of 100 ms.
    pub crdt2: u16,
    /// Command Retry Delay Time 3, in units of 100 ms.
    pub crdt3: u16,
    /// Controller Reachability Capabilities.
    pub crcap: u8,
    /// Controller Instance Uniquifier.
    pub ciu: u8,
    /// Controller Instance Random Number.
    pub cirn: [u8; 8],
    /// Reserved.
    pub rsvd144: [u8; 96],
    /// Reserved for NVMe-MI.
    pub rsvd240: [u8; 13],
    /// NVM Subsystem Report.
    pub nvmsr: u8,
    /// VPD Write Cycle Information.
    pub vwci: u8,
    /// Management Endpoint Capabilities.
    pub mec: u8,
    /// Optional Admin Command Support.
    pub oacs: Oacs,
    /// Abort Command Limit, zero-based.
    pub acl_z: u8,
    /// Asynchronous Event Request Limit, zero-based.
    pub aerl_z: u8,
    /// Firmware Updates.
    pub frmw: Frmw,
    /// Log Page Attributes.
    pub lpa: Lpa,
    /// Error Log Page Entries, zero-based.
    pub elpe_z: u8,
    /// Number of Power States Support, zero-based.
    pub npss_z: u8,
    /// Admin Vendor Specific Command Configuration.
    pub avscc: u8,
    /// Autonomous Power State Transition Attributes.
    pub apsta: u8,
    /// Warning Composite Temperature Threshold, in kelvins.
    pub wctemp: u16,
    /// Critical Composite Temperature Threshold, in kelvins.
    pub cctemp: u16,
    /// Maximum Time for Firmware Activation, in units of 100 ms.
    pub mtfa: u16,
    /// Host Memory Buffer Preferred Size, in units of 4 KiB.
    pub hmpre: u32,
    /// Host Memory Buffer Minimum Size, in units of 4 KiB.
    pub hmmin: u32,
    /// Total NVM Capacity, in bytes.
    pub tnvmcap: Le128,
    /// Unallocated NVM Capacity, in bytes.
    pub unvmcap: Le128,
    /// Replay Protected Memory Block Support.
    pub rpmbs: u32,
    /// Extended Device Self-test Time, in minutes.
    pub edstt: u16,
    /// Device Self-test Options.
    pub dsto: u8,
    /// Firmware Update Granularity, in units of 4 KiB.
    pub fwug: u8,
    /// Keep Alive Support, in units of 100 ms; 0 for none.
    pub kas: u16,
    /// Host Controlled Thermal Management Attributes.
    pub hctma: u16,
    /// Minimum Thermal Management Temperature, in kelvins.
    pub mntmt: u16,
    /// Maximum Thermal Management Temperature, in kelvins.
    pub mxtmt: u16,
    /// Sanitize Capabilities.
    pub sanicap: u32,
    /// Host Memory Buffer Minimum Descriptor Entry Size, in units of 4 KiB.
    pub hmminds: u32,
    /// Host Memory Maximum Descriptors Entries.
    pub hmmaxd: u16,
    /// NVM Set Identifier Maximum.
    pub nsetidmax: u16,
    /// Endurance Group Identifier Maximum.
    pub endgidmax: u16,
    /// ANA Transition Time, in seconds.
    pub anatt: u8,
    /// Asymmetric Namespace Access Capabilities.
    pub anacap: u8,
    /// ANA Group Identifier Maximum.
    pub anagrpmax: u32,
    /// Number of ANA Group Identifiers.
    pub nanagrpid: u32,
    /// Persistent Event Log Size, in units of 64 KiB.
    pub pels: u32,
    /// Domain Identifier.
    pub domain_id: u16,
    /// Key Per I/O Capabilities.
    pub kpioc: u8,
    /// Reserved.
    pub rsvd359: u8,
    /// Maximum Processing Time for Firmware Activation Without Reset, in units of 100 ms.
    pub mptfawr: u16,
    /// Reserved.
    pub rsvd362: [u8; 6],
    /// Max Endurance Group Capacity, in bytes.
    pub megcap: Le128,
    /// Temperature Threshold Hysteresis Attributes.
    pub tmpthha: u8,
    /// Reserved.
    pub rsvd385: u8,
    /// Command Quiesce Time, in milliseconds.
    pub cqt: u16,
    /// Reserved.
    pub rsvd388: [u8; 124],
    /// Submission Queue Entry Size.
    pub sqes: EntrySize,
    /// Completion Queue Entry Size.
    pub cqes: EntrySize,
    /// Maximum Outstanding Commands; 0 for not reported.
    pub maxcmd: u16,
    /// Number of Namespaces: the largest valid NSID.
    pub nn: u32,
    /// Optional NVM Command Support.
    pub oncs: Oncs,
    /// Fused Operation Support.
    pub fuses: Fuses,
    /// Format NVM Attributes.
    pub fna: Fna,
    /// Volatile Write Cache.
    pub vwc: Vwc,
    /// Atomic Write Unit Normal, zero-based, in logical blocks.
    pub awun_z: u16,
    /// Atomic Write Unit Power Fail, zero-based, in logical blocks.
    pub awupf_z: u16,
    /// I/O Command Set Vendor Specific Command Configuration.
    pub icsvscc: u8,
    /// Namespace Write Protection Capabilities.
    pub nwpc: Nwpc,
    /// Atomic Compare & Write Unit, zero-based, in logical blocks.
    pub acwu_z: u16,
    /// Copy Descriptor Formats Supported.
    pub cdfs: u16,
    /// SGL Support.
    pub sgls: Sgls,
    /// Maximum Number of Allowed Namespaces.
    pub mnan: u32,
    /// Maximum Domain Namespace Attachments.
    pub maxdna: Le128,
    /// Maximum I/O Controller Namespace Attachments.
    pub maxcna: u32,
    /// Optimal Aggregated Queue Depth.
    pub oaqd: u32,
    /// Recommended Host-Initiated Refresh Interval, in days.
    pub rhiri: u8,
    /// Host-Initiated Refresh Time, in minutes.
    pub hirt: u8,
    /// Controller Maximum Memory Range Tracking Descriptors.
    pub cmmrtd: u16,
    /// NVM Subsystem Maximum Memory Range Tracking Descriptors.
    pub nmmrtd: u16,
    /// Minimum Memory Range Tracking Granularity, as a power of two.
    pub minmrtg: u8,
    /// Maximum Memory Range Tracking Granularity, as a power of two.
    pub maxmrtg: u8,
    /// Tracking Attributes.
    pub trattr: u8,
    /// Reserved.
    pub rsvd577: u8,
    /// Maximum Controller User Data Migration Queues.
    pub mcudmq: u16,
    /// Maximum NVM Subsystem User Data Migration Queues.
    pub mnsudmq: u16,
    /// Maximum Controller Data Queue Memory Ranges.
    pub mcmr: u16,
    /// NVM Subsystem Maximum Controller Data Queue Memory Ranges.
    pub nmcmr: u16,
    /// Maximum Controller Data Queue PRP Count.
    pub mcdqpc: u16,
    /// Reserved.
    pub rsvd588: [u8; 180],
    /// NVM Subsystem NVMe Qualified Name, UTF-8 and NUL-terminated; see [`super::utf8`].
    pub subnqn: [u8; 256],
    /// Reserved.
    pub rsvd1024: [u8; 768],
    /// NVMe over Fabrics: bytes 1792 to 2047.
    pub nvmf: NvmfController,
    /// Power State Descriptors.
    pub psd: [PowerState; 32],
    /// Vendor Specific.
    pub vs: [u8; 1024],
}
zero_default!(IdentifyController);
layout!(IdentifyController, 4096, ssvid @ 2, sn @ 4, mn @ 24, fr @ 64, rab @ 72, ieee @ 73,
    cmic @ 76, mdts @ 77, cntlid @ 78, ver @ 80, rtd3r @ 84, rtd3e @ 88, oaes @ 92, ctratt @ 96,
    rrls @ 100, bpcap @ 102, nssl @ 104, plsi @ 110, cntrltype @ 111, fguid @ 112, crdt1 @ 128,
    crdt2 @ 130, crdt3 @ 132, crcap @ 134, ciu @ 135, cirn @ 136, nvmsr @ 253, vwci @ 254,
    mec @ 255, oacs @ 256, acl_z @ 258, aerl_z @ 259, frmw @ 260, lpa @ 261, elpe_z @ 262,
    npss_z @ 263, avscc @ 264, apsta @ 265, wctemp @ 266, cctemp @ 268, mtfa @ 270, hmpre @ 272,
    hmmin @ 276, tnvmcap @ 280, unvmcap @ 296, rpmbs @ 312, edstt @ 316, dsto @ 318, fwug @ 319,
    kas @ 320, hctma @ 322, mntmt @ 324, mxtmt @ 326, sanicap @ 328, hmminds @ 332,
    hmmaxd @ 336, nsetidmax @ 338, endgidmax @ 340, anatt @ 342, anacap @ 343, anagrpmax @ 344,
    nanagrpid @ 348, pels @ 352, domain_id @ 356, kpioc @ 358, mptfawr @ 360, megcap @ 368,
    tmpthha @ 384, cqt @ 386, sqes @ 512, cqes @ 513, maxcmd @ 514, nn @ 516, oncs @ 520,
    fuses @ 522, fna @ 524, vwc @ 525, awun_z @ 526, awupf_z @ 528, icsvscc @ 530, nwpc @ 531,
    acwu_z @ 532, cdfs @ 534, sgls @ 536, mnan @ 540, maxdna @ 544, maxcna @ 560, oaqd @ 564,
    rhiri @ 568, hirt @ 569, cmmrtd @ 570, nmmrtd @ 572, minmrtg @ 574, maxmrtg @ 575,
    trattr @ 576, mcudmq @ 578, mnsudmq @ 580, mcmr @ 582, nmcmr @ 584, mcdqpc @ 586,
    subnqn @ 768, nvmf @ 1792, psd @ 2048, vs @ 3072);

/// The NVMe over Fabrics part of [`IdentifyController`]; all zero for a PCIe controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NvmfController {
    /// I/O Queue Command Capsule Supported Size, in units of 16 bytes.
    pub ioccsz: u32,
    /// I/O Queue Response Capsule Supported Size, in units of 16 bytes.
    pub iorcsz: u32,
    /// In Capsule Data Offset, in units of 16 bytes.
    pub icdoff: u16,
    /// Fabrics Controller Attributes.
    pub fcatt: u8,
    /// Maximum SGL Data Block Descriptors.
    pub msdbd: u8,
    /// Optional Fabrics Commands Support.
    pub ofcs: u16,
    /// Discovery Controller Type.
    pub dctype: u8,
    /// Reserved.
    pub rsvd15: [u8; 241],
}
zero_default!(NvmfController);
layout!(NvmfController, 256, iorcsz @ 4, icdoff @ 8, fcatt @ 10, msdbd @ 11, ofcs @ 12, dctype @ 14);
