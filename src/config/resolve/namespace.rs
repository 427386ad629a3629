//! Checks of a namespace, and what is not said of it.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::MAX_NSID;
use crate::config::{Huge, NamespaceSpec, StoreSpec, raw, ssds};

const BACKENDS: &str = "null, memory, file, nvme-passthrough and nvme";

/// Check a namespace, the `index`th of the controller whose names are made of `seed`.
pub(super) fn namespace(
    ns: raw::Namespace,
    index: usize,
    seed: &str,
) -> Result<NamespaceSpec, String> {
    let nsid = match ns.nsid {
        Some(nsid) => nsid,
        None => u32::try_from(index + 1).unwrap_or(u32::MAX),
    };
    let fail = |e: String| format!("namespace {nsid}: {e}");
    if !(1..=MAX_NSID).contains(&nsid) {
        return Err(fail(format!("an nsid is 1 to {MAX_NSID}")));
    }
    let block_shift = match ns.block_size.map_or(4096, |s| s.0) {
        512 => 9,
        4096 => 12,
        other => {
            return Err(fail(format!(
                "block-size is {other}; it can be 512 or 4096"
            )));
        }
    };
    let (store, id) = store(&ns, block_shift).map_err(fail)?;
    if let Some(zone) = &ns.danger_zone
        && !zone.i_want_broken_io
    {
        return Err(fail(
            "danger-zone makes I/O fail or hang; set i-want-broken-io = true in it, or remove it"
                .into(),
        ));
    }
    if let Some(zone) = &ns.danger_zone {
        ssds::check_passed(zone, &store).map_err(fail)?;
    }
    Ok(NamespaceSpec {
        nsid,
        store,
        block_shift,
        read_only: ns.read_only.unwrap_or(false),
        identity: format!("{seed}/{nsid}/{id}"),
        uuid: ns
            .uuid
            .map(|t| hex::<16>("uuid", &t.replace('-', "")))
            .transpose()
            .map_err(fail)?,
        nguid: ns
            .nguid
            .map(|t| hex::<16>("nguid", &t))
            .transpose()
            .map_err(fail)?,
        eui64: ns
            .eui64
            .map(|t| hex::<8>("eui64", &t))
            .transpose()
            .map_err(fail)?,
        danger_zone: ns.danger_zone,
    })
}

/// The store of a namespace, and what tells it from others.
fn store(ns: &raw::Namespace, block_shift: u32) -> Result<(StoreSpec, String), String> {
    let only = |key: &str, given: bool, kind: &str| {
        if given {
            Err(format!(
                "'{key}' means nothing for a {kind} namespace; remove it"
            ))
        } else {
            Ok(())
        }
    };
    let size = |kind: &str| {
        let Some(size) = ns.size else {
            return Err(format!("a {kind} namespace needs a size, such as size=1G"));
        };
        crate::backend::geometry::blocks_of(size.0, block_shift)
            .map(|_| size.0)
            .map_err(|e| e.to_string())
    };
    if ns.backend.as_deref() != Some("nvme") {
        let kind = ns.backend.as_deref().unwrap_or("such");
        only("address", ns.address.is_some(), kind)?;
        only("ssd-namespace", ns.ssd_namespace.is_some(), kind)?;
        only("offset", ns.offset.is_some(), kind)?;
    }
    match ns.backend.as_deref() {
        Some("nvme") => {
            only("path", ns.path.is_some(), "nvme")?;
            only("direct", ns.direct.is_some(), "nvme")?;
            only("iopoll", ns.iopoll.is_some(), "nvme")?;
            only("huge-pages", ns.huge_pages.is_some(), "nvme")?;
            ssds::store(ns)
        }
        Some("null") => {
            only("path", ns.path.is_some(), "null")?;
            only("direct", ns.direct.is_some(), "null")?;
            only("iopoll", ns.iopoll.is_some(), "null")?;
            only("huge-pages", ns.huge_pages.is_some(), "null")?;
            let bytes = size("null")?;
            Ok((StoreSpec::Null { bytes }, "null".into()))
        }
        Some("memory") => {
            only("path", ns.path.is_some(), "memory")?;
            only("direct", ns.direct.is_some(), "memory")?;
            only("iopoll", ns.iopoll.is_some(), "memory")?;
            let bytes = size("memory")?;
            let huge_pages = ns.huge_pages.unwrap_or(Huge::IfFree);
            Ok((StoreSpec::Memory { bytes, huge_pages }, "memory".into()))
        }
        Some("file") => {
            only("huge-pages", ns.huge_pages.is_some(), "file")?;
            if ns.size.is_some() {
                return Err(
                    "a file namespace is as large as its file; remove 'size', and make the file with 'truncate -s 10G FILE'".into(),
                );
            }
            let Some(path) = ns.path.clone() else {
                return Err("a file namespace needs a path, such as path=/srv/disk.img".into());
            };
            check_path(&path, ns.read_only.unwrap_or(false), false)?;
            let id = String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
            let direct = ns.direct.unwrap_or(true);
            let iopoll = ns.iopoll.unwrap_or_default();
            Ok((
                StoreSpec::File {
                    path,
                    direct,
                    iopoll,
                },
                id,
            ))
        }
        Some("nvme-passthrough") => {
            let kind = "nvme-passthrough";
            only("huge-pages", ns.huge_pages.is_some(), kind)?;
            only("direct", ns.direct.is_some(), kind)?;
            only("iopoll", ns.iopoll.is_some(), kind)?;
            if ns.size.is_some() || ns.block_size.is_some() {
                return Err(
                    "an nvme-passthrough namespace has the size and the blocks of its SSD; remove 'size' and 'block-size'".into(),
                );
            }
            let Some(path) = ns.path.clone() else {
                return Err(
                    "an nvme-passthrough namespace needs a path, such as path=/dev/ng0n1".into(),
                );
            };
            check_path(&path, ns.read_only.unwrap_or(false), true)?;
            let id = String::from_utf8_lossy(path.as_os_str().as_bytes()).into_owned();
            Ok((StoreSpec::NvmePassthrough { path }, id))
        }
        Some(other) => Err(format!(
            "there is no backend '{other}'; there are {BACKENDS}"
        )),
        None => Err(format!("it has no backend; there are {BACKENDS}")),
    }
}

/// Whether a file or block device, or a character device, is there and can be opened.
fn check_path(path: &Path, read_only: bool, char_device: bool) -> Result<(), String> {
    use rustix::fs::Access;
    use std::os::unix::fs::FileTypeExt;
    let shown = path.display();
    let kind = match std::fs::metadata(path) {
        Ok(m) => m.file_type(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && char_device => {
            return Err(format!(
                "there is no {shown}; Linux 5.13 and later has a /dev/ngXnY for each NVMe namespace"
            ));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!(
                "there is no file {shown}; make it with 'truncate -s 10G {shown}'"
            ));
        }
        Err(e) => return Err(format!("cannot look at {shown}: {e}")),
    };
    if char_device && !kind.is_char_device() {
        return Err(format!(
            "{shown} is no NVMe generic device: name a /dev/ngXnY, or use backend file"
        ));
    }
    if !char_device && !kind.is_file() && !kind.is_block_device() {
        return Err(format!("{shown} is neither a file nor a block device"));
    }
    if rustix::fs::access(path, Access::READ_OK).is_err() {
        return Err(format!(
            "this user may not read {shown}; give the right to, or run as another user"
        ));
    }
    if !read_only && rustix::fs::access(path, Access::WRITE_OK).is_err() {
        return Err(format!(
            "this user may not write {shown}; give the right to, or add read-only"
        ));
    }
    Ok(())
}

fn hex<const N: usize>(what: &str, text: &str) -> Result<[u8; N], String> {
    let bad = || {
        format!(
            "{what} '{text}' is not {} hexadecimal digits, or all zero",
            2 * N
        )
    };
    if text.len() != 2 * N || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let mut out = [0; N];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = text
            .get(2 * i..2 * i + 2)
            .and_then(|d| u8::from_str_radix(d, 16).ok())
            .ok_or_else(bad)?;
    }
    if out == [0; N] {
        return Err(bad());
    }
    Ok(out)
}
