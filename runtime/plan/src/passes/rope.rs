//! The rotation of queries, the rotation of keys and the write to the cache become one op.

use super::{Uses, remove};
use crate::{Op, Value, builder::Draft};

/// `rope(q); rope(k); kv_write(k, v)` becomes one op where both rotations are equal and only the cache reads
/// the rotated keys. The three ops must be adjacent, so that no op between them can read a value that the
/// fusion does not make.
pub(super) fn fold_rope_kv_write(draft: &mut Draft) {
    let uses = Uses::of(draft);
    let mut folded = Vec::new();
    for index in 2..draft.ops.len() {
        let Op::KvWrite { layer, keys, values } = draft.ops[index] else { continue };
        let (Some((a, spec)), Some((b, other))) =
            (rotation(&draft.ops[index - 2]), rotation(&draft.ops[index - 1]))
        else {
            continue;
        };
        let query = if a == keys { b } else { a };
        // The rope itself reads the keys too.
        let only_cached = uses.readers.get(&keys) == Some(&2) && [a, b].contains(&keys);
        if query == keys || values == query || spec != other || !only_cached {
            continue;
        }
        draft.ops[index] = Op::RopeKvWrite { layer, query, keys, values, spec };
        folded.extend([index - 2, index - 1]);
    }
    remove(draft, &folded);
}

fn rotation(op: &Op<Value>) -> Option<(Value, crate::RopeSpec)> {
    match op {
        Op::Rope { data, spec } => Some((*data, *spec)),
        _ => None,
    }
}
