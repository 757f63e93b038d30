//! Separates a whole model from other content of GGUF files: a part of a model, an adapter, a projector.

use super::{Gguf, GgufProblem};

/// What `general.type` holds for a model; older files have no such key.
const MODEL: &str = "model";

impl Gguf {
    /// Refuses a file that is not part `index` of a model in `count` files. The first says what it is.
    pub(crate) fn check_part(&self, index: u64, count: u64) -> Result<(), GgufProblem> {
        let meta = &self.metadata;
        let kind = meta.opt_string("general.type")?.unwrap_or(MODEL);
        if kind != MODEL || meta.has("adapter.type") {
            let found = match meta.opt_string("adapter.type")? {
                Some(adapter) => format!("an adapter ({adapter})"),
                None => format!("{kind:?}"),
            };
            return Err(GgufProblem::NotModel { found });
        }
        let own = meta.opt_unsigned("split.no")?.unwrap_or(0);
        let all = meta.opt_unsigned("split.count")?.unwrap_or(1);
        if (own, all.max(1)) != (index, count) {
            return Err(GgufProblem::Part { number: own.saturating_add(1), count: all });
        }
        Ok(())
    }

    /// Refuses parts that together have another number of tensors than this one, the first, says.
    pub(crate) fn check_tensor_count(&self, found: u64) -> Result<(), GgufProblem> {
        match self.metadata.opt_unsigned("split.tensors.count")? {
            Some(total) if total != found => {
                let why = format!("{total} tensors in all parts, and {found} were found");
                Err(GgufProblem::BadValue { key: "split.tensors.count".to_owned(), why })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufValue, GgufWriter};
    use trustformers_plan::DType;

    fn problem(pairs: &[(&str, GgufValue)]) -> Option<String> {
        let mut file = GgufWriter::new();
        for (key, value) in pairs {
            file.pair(key, value);
        }
        file.tensor("t", &[4], DType::F32, &[0; 16]);
        let file = file.finish();
        let gguf = Gguf::parse(&file).unwrap();
        let whole = gguf.check_part(0, 1).and_then(|()| gguf.check_tensor_count(1));
        whole.err().map(|problem| problem.to_string())
    }

    #[test]
    fn parts_are_refused_with_their_number() {
        let number = GgufValue::U32;
        assert_eq!(problem(&[]), None);
        let single = [("split.no", number(0)), ("split.count", number(1))];
        assert_eq!(problem(&single), None);
        let first = problem(&[("split.no", number(0)), ("split.count", number(2))]).unwrap();
        assert!(first.contains("part 1 of 2") && first.contains("NAME-00001-of-00002.gguf"), "{first}");
        let second = problem(&[("split.no", number(1)), ("split.count", number(2))]).unwrap();
        assert!(second.contains("part 2 of 2"), "{second}");
        let lacking = problem(&[("split.tensors.count", number(9))]).unwrap();
        assert!(lacking.contains("split.tensors.count: 9 tensors"), "{lacking}");
    }

    #[test]
    fn adapters_and_projectors_are_not_models() {
        let text = |text: &str| GgufValue::String(text.to_owned());
        assert_eq!(problem(&[("general.type", text("model"))]), None);
        let adapter = problem(&[("general.type", text("adapter")), ("adapter.type", text("lora"))]).unwrap();
        assert!(adapter.contains("an adapter (lora)"), "{adapter}");
        assert!(problem(&[("adapter.type", text("lora"))]).is_some());
        let projector = problem(&[("general.type", text("mmproj"))]).unwrap();
        assert!(projector.contains("\"mmproj\", not a model"), "{projector}");
    }
}
