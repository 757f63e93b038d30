//! Checks that the configurations of encoders share: classes, sizes, heads, norms and keys.

use super::CheckpointProblem;
use serde_json::Value;
use std::collections::BTreeMap;

/// Largest size that is believed: every number that a plan carries fits 32 bits.
const MOST: usize = u32::MAX as usize / 2;

/// Refuses a checkpoint whose first class is not in the list `served`.
pub(super) fn check_class(architectures: &[String], served: &'static str) -> Result<(), CheckpointProblem> {
    let is_served = |class: &String| served.split(", ").any(|own| own == class);
    match architectures.first().filter(|class| !is_served(class)) {
        None => Ok(()),
        Some(class) => Err(CheckpointProblem::unsupported("architectures", format!("{class:?}"), served)),
    }
}

/// Refuses a size that cannot be right, by its key.
pub(super) fn check_sizes(sizes: &[(&'static str, usize)]) -> Result<(), CheckpointProblem> {
    match sizes.iter().find(|(_, size)| !(1..=MOST).contains(size)) {
        None => Ok(()),
        Some(&(key, size)) => {
            Err(CheckpointProblem::Malformed { key, why: format!("{size} is not between 1 and {MOST}") })
        }
    }
}

/// Refuses heads that do not divide the width. Where `rotated`, a rotation pairs the elements of each. Both
/// sizes were checked.
pub(super) fn check_heads(heads: usize, width: usize, rotated: bool) -> Result<(), CheckpointProblem> {
    let pairs = !rotated || (width / heads).is_multiple_of(2);
    if width.is_multiple_of(heads) && pairs {
        return Ok(());
    }
    let even = if rotated { " into heads of an even size" } else { "" };
    let why = format!("{heads} does not divide the {width} of hidden_size{even}");
    Err(CheckpointProblem::Malformed { key: "num_attention_heads", why })
}

/// Refuses what a norm cannot add to a variance.
pub(super) fn check_eps(key: &'static str, eps: f32) -> Result<(), CheckpointProblem> {
    if eps >= 0.0 && eps.is_finite() {
        return Ok(());
    }
    Err(CheckpointProblem::Malformed { key, why: format!("{eps} is not a number from 0 on") })
}

/// Refuses a base of rotary positions that gives no frequencies.
pub(super) fn check_base(key: &'static str, base: f32) -> Result<(), CheckpointProblem> {
    if base > 0.0 && base.is_finite() {
        return Ok(());
    }
    Err(CheckpointProblem::Malformed { key, why: format!("{base} is not a number above 0") })
}

/// A key with the only value, as JSON, that is computed.
pub(super) type OnlyValue = (&'static str, &'static str);

/// Refuses keys with another value than the only one. They may be left out.
pub(super) fn check_only(
    keys: &BTreeMap<String, Value>,
    only: impl IntoIterator<Item = OnlyValue>,
) -> Result<(), CheckpointProblem> {
    for (key, only) in only {
        if let Some(found) = keys.get(key).filter(|found| !is_same(found, only)) {
            return Err(CheckpointProblem::unsupported(key, found.to_string(), only));
        }
    }
    Ok(())
}

/// Refuses a key that nothing reads and that may change an answer.
pub(super) fn check_unread(
    keys: &BTreeMap<String, Value>,
    model_type: &str,
    is_known: impl Fn(&str) -> bool,
) -> Result<(), CheckpointProblem> {
    match keys.keys().find(|key| !is_known(key)) {
        None => Ok(()),
        Some(key) => {
            Err(CheckpointProblem::UnreadConfigKey { key: key.clone(), model_type: model_type.to_owned() })
        }
    }
}

/// Numbers are the same in every spelling.
fn is_same(found: &Value, only: &str) -> bool {
    match (found.as_f64(), only.parse::<f64>()) {
        (Some(found), Ok(only)) => found == only,
        _ => {
            let json = found.to_string();
            json == only
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_only_value_of_a_key_is_compared_as_json() {
        for (found, only, same) in [
            (json!(1), "1.0", true),
            (json!(1.0), "1", true),
            (json!(0.5), "1.0", false),
            (json!(false), "false", true),
            (json!(null), "null", true),
            (json!(null), "false", false),
            (json!("gelu"), "\"gelu\"", true),
        ] {
            assert_eq!(is_same(&found, only), same, "{found} and {only}");
        }
        let keys = BTreeMap::from([("a".to_owned(), json!(2)), ("b".to_owned(), json!(false))]);
        let only = |value| check_only(&keys, [("b", "false"), ("missing", "1"), ("a", value)]);
        assert_eq!(only("2.0"), Ok(()));
        assert_eq!(only("1"), Err(CheckpointProblem::unsupported("a", "2".to_owned(), "1")));
        let unread = check_unread(&keys, "bert", |key| key == "a").unwrap_err().to_string();
        assert!(unread.starts_with("key b is not part of bert"), "{unread}");
    }

    #[test]
    fn sizes_that_cannot_be_right_are_refused_by_their_key() {
        let refused = |result: Result<(), CheckpointProblem>| result.unwrap_err().to_string();
        let error = refused(check_sizes(&[("hidden_size", 4), ("vocab_size", 0)]));
        assert!(error.starts_with("key vocab_size: 0 is not between 1 and"), "{error}");
        assert_eq!(check_heads(4, 12, false), Ok(()));
        assert!(refused(check_heads(5, 12, false)).ends_with("5 does not divide the 12 of hidden_size"));
        assert!(refused(check_heads(4, 12, true)).ends_with("into heads of an even size"));
        assert!(refused(check_eps("norm_eps", f32::NAN)).starts_with("key norm_eps: NaN is not a number"));
        assert!(
            refused(check_base("rope_theta", 0.0)).starts_with("key rope_theta: 0 is not a number above")
        );
        let class = |class: &str| check_class(&[class.to_owned()], "BertModel, BertForMaskedLM");
        assert_eq!((class("BertModel"), check_class(&[], "BertModel")), (Ok(()), Ok(())));
        assert!(refused(class("Bert")).starts_with("key architectures is \"Bert\""));
    }
}
