//! A daemon that is killed, and a guest that does not notice.

mod history;
mod kills;
mod load;
mod other;
