//! vhost-user: the controller at a Unix socket, as `docs/VHOST_USER.md` describes it.
//!
//! Each front-end is served by a [`connection`]: messages are put together ([`message`]), parsed and checked by the crate `vhost`, and
//! carried out by a [`device::Device`]. Requests to the front-end have a thread of their own ([`channel`]).

mod channel;
mod connection;
mod device;
mod message;
mod page;

pub(super) use connection::serve;
