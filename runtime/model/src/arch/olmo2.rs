//! OLMo 2: no norms of what a block's parts read, but of what they add, and of whole rows of queries and
//! keys.

use super::decoder::{BlockNorms, Family, QkNorm};

/// Converters store queries and keys as they were trained.
pub(super) const FAMILY: Family = Family { norms: BlockNorms::Post, qk_norm: QkNorm::Rows, ..Family::PLAIN };
