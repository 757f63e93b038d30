//! An encoder in a GGUF file: a BERT or a RoBERTa that embeds, classifies or ranks, or a Nomic BERT that
//! embeds.

use super::{EncoderConfig, facts, parameters};
use crate::arch::TensorProblem;
use crate::arch::bert::{EncoderShape, EncoderTensors, Head, HeadOut};
use crate::arch::bert_file::{self, BertKeys, FileArchitecture};
use crate::chat::ChatError;
use crate::checkpoint::{Scoring, Sentence};
use crate::error::LoadError;
use crate::gguf::{Gguf, GgufProblem};
use crate::model::{Model, TextPreparation};
use crate::sampling::SamplingSettings;
use crate::score_head::{ScoreActivation, ScoreHead};
use crate::tokenizer::Tokenizer;
use std::path::Path;
use std::sync::Arc;
use trustformers_plan::{Pooling, Weights};
use trustformers_proto::Task;

/// The warning about a file whose scores are those of several labels.
const EXCLUSIVE: &str = "the file does not say whether its labels exclude each other: their scores add up to 1 \
     (softmax); a request with raw_scores gets the logits";

/// Kinds of tokenizers, by the words of `tokenizer.ggml.model`, that read two texts together.
const PAIRS: [&str; 2] = ["bert", "t5"];

/// A parsed file.
pub(crate) struct EncoderFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) gguf: &'a Gguf,
    /// Its content.
    pub(crate) bytes: &'a [u8],
    /// The sizes of all parts together.
    pub(crate) file_bytes: usize,
    pub(crate) architecture: &'static FileArchitecture,
}

/// Checks an encoder's file whose tensors are `stored`. Vectors get the length one, as in llama.cpp: files do
/// not say it.
pub(crate) fn load(file: &EncoderFile<'_>, stored: &Weights) -> Result<Model, LoadError> {
    let EncoderFile { path, gguf, bytes, file_bytes, architecture } = *file;
    let FileArchitecture { name, family, .. } = *architecture;
    let wrong = |problem| LoadError::gguf(path, problem);
    let BertKeys { config, pooling, scores, labels } =
        bert_file::keys(architecture, gguf, bytes, stored).map_err(wrong)?;
    let tensor = |problem: TensorProblem| wrong(GgufProblem::from(problem));
    if scores {
        check_pairs(gguf).map_err(wrong)?;
    }
    let tokenizer = Tokenizer::from_gguf(gguf, bytes)
        .map_err(|problem| LoadError::Tokenizer { path: path.to_owned(), problem })?;
    let positions = config.positions(family);
    for (key, needed, most) in [
        ("tokenizer.ggml.tokens".to_owned(), tokenizer.len(), config.vocab_size),
        (format!("{name}.context_length"), tokenizer.special_tokens() + 1, positions),
    ] {
        if needed > most {
            let why = format!("{needed} are needed, and the file has room for {most}");
            return Err(wrong(GgufProblem::BadValue { key, why }));
        }
    }
    let note = || format!("the file has no {name}.pooling_type: the mean over the text's tokens is used");
    let sentence = Sentence {
        pooling: if scores { Pooling::Cls } else { pooling.unwrap_or(Pooling::Mean) },
        note: pooling.is_none().then(note),
        normalised: !scores,
        max_tokens: None,
        lowercase: false,
        prompt: String::new(),
    };
    let (pooling, max_tokens) = (sentence.pooling, positions);
    let head = Head { pooling, normalise: !scores, scores, by_token: false, max_tokens };
    let shape = EncoderShape { family, config: &config, head };
    let EncoderTensors { mut weights, head_out, .. } =
        bert_file::tensors(architecture, &shape, stored).map_err(tensor)?;
    let width = config.hidden_size;
    let (config, parameters) = (EncoderConfig::Bert(family, config), parameters(&weights));
    let architecture = config.resolve(head, &mut weights).map_err(tensor)?;
    let score_head = head_out.map(|out: HeadOut| ScoreHead::new(&out, family.head_activation, width));
    let score_head = score_head.transpose().map_err(tensor)?;
    let scoring = score_head.as_ref().map(|head| scoring(labels, head.labels()));
    let mut facts = facts(&config, head, &sentence, scoring.transpose().map_err(wrong)?);
    if facts.task == Task::Classify {
        facts.warnings.push(EXCLUSIVE.to_owned());
    }
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
        score_head,
    };
    model.check_plan().map_err(|problem| LoadError::Plan { path: path.to_owned(), problem })?;
    Ok(model)
}

/// Refuses a tokenizer without a form for two texts.
fn check_pairs(gguf: &Gguf) -> Result<(), GgufProblem> {
    let key = "tokenizer.ggml.model";
    let found = gguf.metadata.string(key)?;
    if PAIRS.contains(&found) {
        return Ok(());
    }
    let why = format!("{found:?} is not supported for models with scores; supported: {}", PAIRS.join(", "));
    Err(GgufProblem::BadValue { key: key.to_owned(), why })
}

/// What `count` logits mean: one is how well two texts fit each other.
fn scoring(labels: Option<Vec<String>>, count: usize) -> Result<Scoring, GgufProblem> {
    let labels = labels.unwrap_or_else(|| (0..count).map(|id| format!("LABEL_{id}")).collect());
    if labels.len() != count {
        let why = format!("{} labels for a head with {count} logits", labels.len());
        return Err(GgufProblem::BadValue { key: "bert.classifier.output_labels".to_owned(), why });
    }
    let (task, activation) = if count == 1 {
        (Task::Rerank, ScoreActivation::Sigmoid)
    } else {
        (Task::Classify, ScoreActivation::Softmax)
    };
    Ok(Scoring { task, activation, labels })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PlanRequest;
    use crate::gguf::GgufValue;
    use crate::seeded::{SeededCheckpoint, SeededEncoder};
    use trustformers_plan::oracle::Oracle;
    use trustformers_plan::{
        Backend, DType, FusedOps, KvType, Limits, LoadSpec, LogitsRows, Numerics, SequenceStep, StepInput,
        StepOutput,
    };

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

    /// A BERT with a head in a file with these keys.
    fn with_head(labels: usize, keys: &[(&str, GgufValue)]) -> Result<Model, String> {
        let file = SeededCheckpoint { labels, ..SeededCheckpoint::reranker() }.gguf_with(keys);
        Model::from_bytes(Path::new("bert.gguf"), Arc::new(file)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_with_a_head_ranks_or_classifies() {
        let ranker = with_head(1, &[]).unwrap();
        let facts = ranker.facts().classification.clone().unwrap();
        assert_eq!((ranker.task(), facts.activation), (Task::Rerank, ScoreActivation::Sigmoid));
        assert_eq!((facts.labels, ranker.facts().warnings.len()), (vec!["LABEL_0".to_owned()], 0));
        assert!(ranker.facts().embedding.is_none());
        // Converters leave the pooling out where no file of sentence-transformers names one.
        let unnamed = with_head(1, &[("bert.pooling_type", GgufValue::U32(0))]).unwrap();
        assert_eq!(unnamed.facts(), ranker.facts());
        let labels = GgufValue::Strings(["HAM", "SPAM"].map(str::to_owned).to_vec());
        let classifier = with_head(2, &[("bert.classifier.output_labels", labels)]).unwrap();
        let facts = classifier.facts().classification.clone().unwrap();
        assert_eq!((classifier.task(), facts.activation), (Task::Classify, ScoreActivation::Softmax));
        assert_eq!(facts.labels, ["HAM", "SPAM"]);
        assert!(classifier.facts().warnings[0].contains("softmax"), "{:?}", classifier.facts().warnings);
    }

    #[test]
    fn a_head_that_is_not_whole_is_refused_by_name() {
        let vectors = with_head(1, &[("bert.pooling_type", GgufValue::U32(2))]).unwrap_err();
        assert!(vectors.contains("bert.classifier.output_labels is not part of the bert"), "{vectors}");
        let labels = GgufValue::Strings(vec!["a".to_owned()]);
        let few = with_head(2, &[("bert.classifier.output_labels", labels)]).unwrap_err();
        assert!(few.contains("key bert.classifier.output_labels: 1 labels for a head with 2"), "{few}");
        let rename = |from: &[u8], to: &[u8]| {
            let mut file = SeededCheckpoint::reranker().gguf_with(&[]);
            let at = file.windows(from.len()).position(|window| window == from).unwrap();
            file[at..at + to.len()].copy_from_slice(to);
            Model::from_bytes(Path::new("bert.gguf"), Arc::new(file)).unwrap_err().to_string()
        };
        let pooler = rename(b"cls.weight", b"clz.weight");
        assert!(
            pooler.contains("tensor cls.weight: it is missing: the converter left out the pooler"),
            "{pooler}"
        );
        let bias = rename(b"cls.output.bias", b"cls.output.biaz");
        assert!(bias.contains("tensor cls.output.bias: it is missing"), "{bias}");
        let dense = rename(b"cls.bias", b"clz.bias");
        assert!(dense.contains("tensor clz.bias: it is not part of the bert architecture"), "{dense}");
    }

    #[test]
    fn what_would_change_vectors_is_refused_by_its_key() {
        let cases = [
            ("bert.attention.causal", GgufValue::Bool(true), "only false is"),
            ("bert.pooling_type", GgufValue::U32(4), "tensor cls.output.weight: it is missing"),
            ("bert.pooling_type", GgufValue::U32(5), "5 is not supported"),
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
