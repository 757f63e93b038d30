//! Turning queries, turning keys and writing the cache, at once.

use super::{Uses, remove};
use crate::{Op, Value, builder::Draft};

/// `rope(q); rope(k); kv_write(k, v)` becomes one op where both turn alike and turned keys are read by the cache alone.
/// The three must follow each other: then there is nothing in between that could see the difference.
pub(super) fn fold_rope_kv_write(draft: &mut Draft) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 2..draft.ops.len() {
        let Op::KvWrite { layer, keys, values } = draft.ops[index] else { continue };
        let (Some((a, spec)), Some((b, other))) =
            (turned(&draft.ops[index - 2]), turned(&draft.ops[index - 1]))
        else {
            continue;
        };
        let query = if a == keys { b } else { a };
        // The rope itself reads the keys too.
        let for_the_cache = uses.readers.get(&keys) == Some(&2) && [a, b].contains(&keys);
        if query == keys || values == query || spec != other || !for_the_cache {
            continue;
        }
        draft.ops[index] = Op::RopeKvWrite { layer, query, keys, values, spec };
        folded.extend([index - 2, index - 1]);
    }
    remove(draft, &folded);
}

fn turned(op: &Op<Value>) -> Option<(Value, crate::RopeSpec)> {
    match op {
        Op::Rope { data, spec } => Some((*data, *spec)),
        _ => None,
    }
}
