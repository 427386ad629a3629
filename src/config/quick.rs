//! `--namespace` of the command line: `memory,size=1G,block-size=512,read-only`.

use toml::Spanned;

use super::raw::{Huge, IoPoll, Namespace};
use super::size;

const KEYS: &str = "size, path, address, ssd-namespace, offset, block-size, read-only, direct, iopoll, huge-pages, nsid, uuid, nguid, eui64";

/// Parse the value of one `--namespace`.
///
/// # Errors
///
/// A line that says what is wrong.
pub fn namespace(text: &str) -> Result<Namespace, String> {
    let mut parts = text.split(',');
    // `nvme:0000:01:00.0` is the backend and the SSD's address.
    let (backend, address) = match parts.next() {
        Some(first) => match first.split_once(':') {
            Some((backend, address)) => (Some(backend), Some(address)),
            None => (Some(first), None),
        },
        None => (None, None),
    };
    let mut ns = Namespace {
        backend: backend.map(str::to_owned),
        address: address.map(str::to_owned),
        ..Namespace::default()
    };
    for part in parts {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        let need = || value.ok_or_else(|| format!("'{key}' needs a value: {key}=..."));
        let flag = || match value {
            None | Some("true" | "on" | "yes") => Ok(true),
            Some("false" | "off" | "no") => Ok(false),
            Some(v) => Err(format!("'{key}' is on or off, not '{v}'")),
        };
        match key {
            "size" => ns.size = Some(size::parse(need()?)?),
            "address" => ns.address = Some(need()?.into()),
            "ssd-namespace" => {
                let v = need()?;
                ns.ssd_namespace = Some(v.parse().map_err(|_| format!("'{v}' is not an nsid"))?);
            }
            "offset" => ns.offset = Some(size::parse(need()?)?),
            "path" => ns.path = Some(need()?.into()),
            "block-size" => ns.block_size = Some(size::parse(need()?)?),
            "read-only" => ns.read_only = Some(flag()?),
            "direct" => ns.direct = Some(flag()?),
            "iopoll" => {
                ns.iopoll = Some(match value {
                    Some("auto") => IoPoll::Auto,
                    _ if flag()? => IoPoll::On,
                    _ => IoPoll::Off,
                });
            }
            "huge-pages" => {
                ns.huge_pages = Some(match need()? {
                    "if-free" => Huge::IfFree,
                    "never" => Huge::Never,
                    "required" => Huge::Required,
                    v => {
                        return Err(format!(
                            "'huge-pages' is if-free, never or required, not '{v}'"
                        ));
                    }
                });
            }
            "nsid" => {
                let v = need()?;
                ns.nsid = Some(v.parse().map_err(|_| format!("'{v}' is not an nsid"))?);
            }
            "uuid" => ns.uuid = Some(need()?.into()),
            "nguid" => ns.nguid = Some(need()?.into()),
            "eui64" => ns.eui64 = Some(need()?.into()),
            "" => return Err("there is an empty part between two commas".into()),
            _ => return Err(format!("unknown key '{key}'; there are {KEYS}")),
        }
    }
    Ok(ns)
}

/// As if it stood in a file.
pub fn spanned(namespace: Namespace) -> Spanned<Namespace> {
    Spanned::new(0..0, namespace)
}
