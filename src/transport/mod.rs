//! The front-ends a controller can be attached to. They know the controller; it does not know them.

pub mod vhost_user;
