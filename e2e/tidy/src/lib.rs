//! What lints cannot say: crate edges, file length, documented modules.
