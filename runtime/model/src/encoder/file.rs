//! An encoder in a GGUF file: a BERT that embeds, with its WordPiece vocabulary.

use super::{EncoderConfig, facts, parameters};
use crate::arch::TensorProblem;
use crate::arch::bert::Head;
use crate::arch::bert_file::{self, BertKeys};
use crate::arch::encoder_family::BERT;
use crate::chat::ChatError;
use crate::checkpoint::Sentence;
use crate::error::LoadError;
use crate::gguf::{Gguf, GgufProblem};
use crate::model::{Model, TextPreparation};
use crate::sampling::SamplingSettings;
use crate::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;
use trustformers_plan::{Pooling, Weights};

/// The note of answers whose file does not configure the pooling.
const NOTE: &str = "the file has no bert.pooling_type: the mean over the text's tokens is used";

/// A parsed file.
pub(crate) struct EncoderFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) gguf: &'a Gguf,
    /// Its content.
    pub(crate) bytes: &'a [u8],
    /// The sizes of all parts together.
    pub(crate) file_bytes: usize,
}

/// Checks an encoder's file whose tensors are `stored`. Vectors get the length one, as in llama.cpp: files do
/// not say it.
pub(crate) fn load(file: &EncoderFile<'_>, stored: &Weights) -> Result<Model, LoadError> {
    let EncoderFile { path, gguf, bytes, file_bytes } = *file;
    let wrong = |problem| LoadError::gguf(path, problem);
    let BertKeys { config, pooling } = bert_file::keys(&gguf.metadata, stored).map_err(wrong)?;
    let tensor = |problem: TensorProblem| wrong(GgufProblem::from(problem));
    let mut weights = bert_file::renamed(stored).map_err(tensor)?;
    let tokenizer = Tokenizer::from_gguf(gguf, bytes)
        .map_err(|problem| LoadError::Tokenizer { path: path.to_owned(), problem })?;
    let positions = config.positions(&BERT);
    for (key, needed, most) in [
        ("tokenizer.ggml.tokens", tokenizer.len(), config.vocab_size),
        ("bert.context_length", tokenizer.special_tokens() + 1, positions),
    ] {
        if needed > most {
            let why = format!("{needed} are needed, and the file has room for {most}");
            return Err(wrong(GgufProblem::BadValue { key: key.to_owned(), why }));
        }
    }
    let sentence = Sentence {
        pooling: pooling.unwrap_or(Pooling::Mean),
        note: pooling.is_none().then(|| NOTE.to_owned()),
        normalised: true,
        max_tokens: None,
        lowercase: false,
        prompt: String::new(),
    };
    let head = Head { pooling: sentence.pooling, normalise: true, scores: false, max_tokens: positions };
    let (config, parameters) = (EncoderConfig::Bert(&BERT, config), parameters(&weights));
    let architecture = config.resolve(head, &mut weights).map_err(tensor)?;
    let mut facts = facts(&config, head, &sentence, None);
    (facts.parameters, facts.file_bytes) = (parameters, file_bytes as u64);
    facts.name = gguf.metadata.opt_string("general.name").map_err(wrong)?.map(str::to_owned);
    let model = Model {
        weights: Arc::new(weights),
        tokenizer,
        facts,
        architecture,
        chat: Err(ChatError::NoTemplate),
        preparation: TextPreparation::default(),
        sampling: SamplingSettings::default(),
        score_head: None,
    };
    model.check_plan().map_err(|problem| LoadError::Plan { path: path.to_owned(), problem })?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PlanRequest;
    use crate::gguf::GgufValue;
    use crate::seeded::SeededEncoder;
    use trustformers_plan::oracle::Oracle;
    use trustformers_plan::{
        Backend, DType, FusedOps, KvType, Limits, LoadSpec, LogitsRows, Numerics, SequenceStep, StepInput,
        StepOutput,
    };
    use trustformers_proto::Task;

    const TEXT: &str = "Hello the CAT, talking! xyz\u{e9} \u{4e00}";

    fn of_file(dtype: DType, keys: &[(&str, GgufValue)]) -> Result<Model, String> {
        let file = SeededEncoder::default().gguf_with(dtype, keys);
        Model::from_bytes(Path::new("bert.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    fn of_folder() -> Model {
        let folder = tempfile::tempdir().unwrap();
        SeededEncoder::default().write(folder.path()).unwrap();
        Model::load(folder.path(), &mut |_| {}).unwrap()
    }

    /// The vector of a text on the oracle.
    fn vector(model: &Model, text: &str) -> Vec<f32> {
        let limits = Limits { rows: 64, sequences: 1, logits_rows: 0 };
        let request = PlanRequest { context_tokens: 64, limits, fused: FusedOps::NONE };
        let plan = model.plan(&request).unwrap();
        let spec = LoadSpec {
            weights: Arc::clone(model.weights()),
            plan: &plan,
            kv_blocks: 0,
            kv_type: KvType::F32,
            numerics: Numerics::Exact,
            progress: &mut |_| {},
        };
        let mut loaded = Oracle::new().load(spec).unwrap();
        let mut executable = loaded.compile(&plan).unwrap();
        let (tokens, mut input) = (model.encode(text).unwrap().ids, StepInput::new());
        input.push_sequence(SequenceStep {
            tokens: &tokens,
            cached_tokens: 0,
            blocks: &[],
            logits: LogitsRows::None,
        });
        let mut output = StepOutput::new();
        executable.submit(&input).unwrap();
        executable.wait(&mut output).unwrap();
        output.row(0).to_vec()
    }

    #[test]
    fn a_file_answers_as_the_folder_that_it_was_made_from() {
        let (file, folder) = (of_file(DType::F32, &[]).unwrap(), of_folder());
        for text in [TEXT, "", "[MASK] the_cat", "\u{2581}the"] {
            assert_eq!(file.encode(text).unwrap(), folder.encode(text).unwrap(), "{text}");
        }
        let pair = |model: &Model| model.encode_pair("the cat", "hello", 64).unwrap();
        assert_eq!(pair(&file), pair(&folder));
        let facts = file.facts().embedding.clone().unwrap();
        assert_eq!((file.task(), facts.pooling, facts.normalised), (Task::Embed, Pooling::Mean, true));
        assert_eq!((facts.pooling_note, file.facts().context_tokens), (None, 128));
        let wanted = vector(&folder, TEXT);
        for (found, wanted) in vector(&file, TEXT).iter().zip(&wanted) {
            assert!((found - wanted).abs() < 1e-6);
        }
        // Vectors have length one: their product is the cosine.
        for (dtype, least) in [(DType::F16, 0.9999), (DType::Q8_0, 0.99), (DType::Q4_0, 0.8)] {
            let packed = of_file(dtype, &[]).unwrap();
            let name = "encoder.layer.0.output.dense.weight";
            let id = packed.weights().find(name).unwrap();
            assert_eq!(packed.weights().get(id).dtype(), dtype, "it stays as it is stored");
            let cosine: f32 = vector(&packed, TEXT).iter().zip(&wanted).map(|(a, b)| a * b).sum();
            assert!(cosine > least, "{dtype}: {cosine}");
        }
    }

    #[test]
    fn what_would_change_vectors_is_refused_by_its_key() {
        let cases = [
            ("bert.attention.causal", GgufValue::Bool(true), "only false is"),
            ("bert.pooling_type", GgufValue::U32(4), "4 is not supported"),
            ("bert.attention.clamp_kqv", GgufValue::F32(2.0), "2 is not supported"),
            ("bert.something", GgufValue::U32(1), "is not part of the bert architecture"),
            ("bert.context_length", GgufValue::U32(100), "100 x 64"),
            ("tokenizer.ggml.add_sep_token", GgufValue::Bool(false), "only true is"),
            ("tokenizer.ggml.cls_token_id", GgufValue::U32(9999), "is outside the vocabulary"),
            ("tokenizer.ggml.something", GgufValue::U32(1), "is not part of the tokenizer (WordPiece)"),
        ];
        for (key, value, wanted) in cases {
            let error = of_file(DType::F32, &[(key, value)]).unwrap_err();
            assert!(error.contains(wanted), "{key}: {error}");
        }
        let none = of_file(DType::F32, &[("bert.pooling_type", GgufValue::U32(0))]).unwrap();
        assert!(none.facts().embedding.clone().unwrap().pooling_note.is_some());
        let kept = of_file(DType::F32, &[("tokenizer.ggml.normalizer.lowercase", GgufValue::Bool(false))]);
        let ids = |model: &Model, text: &str| model.encode(text).unwrap().ids;
        let kept = kept.unwrap();
        assert_ne!(ids(&kept, "The"), ids(&kept, "the"));
        assert_eq!(ids(&of_folder(), "The"), ids(&of_folder(), "the"));
    }
}
