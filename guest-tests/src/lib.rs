//! The virtual guest: a vhost-user front-end with an NVMe driver in it, in process.
