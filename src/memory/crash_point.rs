//! Where a test stops a process between two stores: nothing of this is in the daemon.
//!
//! Whatever another process would find after a SIGKILL (state files, journals, doorbells, completions and EventIdx in guest memory, stored data)
//! is written through a function that asks [`store_happens`] first. In unit tests of this crate a thread can be made to "die" after a
//! number of such stores ([`Crash::after`]): its later ones have no effect. Elsewhere the answer is a constant, and no code.
//!
//! Not under the feature `testing`: the benchmarks, which count instructions, are built with that.

/// Whether the store that is about to be made has an effect: always, but in a test that stopped this thread.
#[cfg(not(test))]
#[inline(always)]
pub const fn store_happens() -> bool {
    true
}

#[cfg(test)]
pub use counting::{Crash, store_happens};

#[cfg(test)]
mod counting {
    use std::cell::Cell;

    thread_local! {
        /// How many stores of this thread happen, and how many were asked for.
        static STORES: Cell<(u64, u64)> = const { Cell::new((u64::MAX, 0)) };
    }

    /// Whether the store that is about to be made has an effect.
    pub fn store_happens() -> bool {
        STORES.with(|s| {
            let (limit, asked) = s.get();
            s.set((limit, asked + 1));
            asked < limit
        })
    }

    /// This thread dies after some stores; it lives again once this is dropped.
    pub struct Crash(());

    impl Crash {
        /// The next `stores` stores of this thread happen, and none of those after them.
        pub fn after(stores: u64) -> Self {
            STORES.with(|s| s.set((stores, 0)));
            Self(())
        }

        /// Stores that were asked for since then, whether they happened or not.
        pub fn asked(&self) -> u64 {
            STORES.with(|s| s.get().1)
        }

        /// Whether a store was lost.
        pub fn happened(&self) -> bool {
            STORES.with(|s| s.get().1 > s.get().0)
        }
    }

    impl Drop for Crash {
        fn drop(&mut self) {
            STORES.with(|s| s.set((u64::MAX, 0)));
        }
    }
}
