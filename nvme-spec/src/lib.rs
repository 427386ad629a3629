//! The NVMe Base and NVM Command Set specifications (2.x) as types.
#![no_std]
#![forbid(unsafe_code)]
