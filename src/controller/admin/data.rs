//! Moving the data of an admin command between a buffer of ours and the PRPs of the guest.

use nvme_spec::prp::Segment;
use nvme_spec::{Sqe, Status};

use crate::io;
use crate::memory::GuestMap;

/// Call `each` for the pieces of the first `len` bytes the command's PRPs describe.
fn walk(
    map: &GuestMap,
    sqe: &Sqe,
    len: u32,
    mut each: impl FnMut(Segment) -> bool,
) -> Result<(), Status> {
    io::walk(map, sqe.prp1, sqe.prp2, len, |segment| {
        match each(segment) {
            true => Ok(()),
            false => Err(Status::DATA_TRANSFER_ERROR),
        }
    })
}

/// Copy `data` to the guest, and zeroes behind it up to `len` bytes.
pub(super) fn to_guest(map: &GuestMap, sqe: &Sqe, data: &[u8], len: u32) -> Result<(), Status> {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut rest = data;
    walk(map, sqe, len, |segment| {
        let mut at = segment.addr;
        let mut left = segment.len as usize;
        while left > 0 {
            let source = if rest.is_empty() { &ZEROES[..] } else { rest };
            let Some((now, after)) = source.split_at_checked(left.min(source.len())) else {
                return false;
            };
            if !map.write(at, now) {
                return false;
            }
            if !rest.is_empty() {
                rest = after;
            }
            // The walker has checked that a segment ends inside the address space.
            at = at.saturating_add(now.len() as u64);
            left -= now.len();
        }
        true
    })
}

/// Copy from the guest.
pub(super) fn from_guest<const N: usize>(map: &GuestMap, sqe: &Sqe) -> Result<[u8; N], Status> {
    let mut data = [0; N];
    let mut done = 0;
    let len = u32::try_from(N).map_err(|_| Status::INTERNAL_ERROR)?;
    walk(map, sqe, len, |segment| {
        let end = segment.len as usize + done;
        let Some(piece) = data.get_mut(done..end) else {
            return false;
        };
        done = end;
        map.read(segment.addr, piece)
    })?;
    Ok(data)
}
