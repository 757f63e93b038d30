//! Loading a checkpoint that embeds, classifies or ranks texts: its files, checked against each other,
//! become a [`Model`].

pub(crate) mod file;

use crate::arch::bert::{self, EncoderShape, EncoderTensors, Head};
use crate::arch::encoder_family::{self, EncoderBlocks, EncoderFamily, HeadActivation};
use crate::arch::modernbert::{self, ModernBertShape};
use crate::arch::{Architecture, TensorProblem};
use crate::chat::{self, ChatError, ChatTemplate};
use crate::checkpoint::decoder::model_types;
use crate::checkpoint::{
    BertConfig, CONFIG, CheckpointFiles, CheckpointProblem, HeadConfig, ModernBertConfig, Scoring, Sentence,
    StoredTensors, TOKENIZER, WEIGHTS, nomic_config,
};
use crate::error::{LoadError, TokenizerProblem};
use crate::model::{ClassificationFacts, EmbeddingFacts, Model, ModelFacts, TextPreparation};
use crate::sampling::SamplingSettings;
use crate::score_head::ScoreHead;
use crate::source::OnRead;
use crate::tokenizer::Tokenizer;
use serde::Deserialize;
use std::sync::Arc;
use trustformers_plan::{Pooling, Weights};
use trustformers_proto::Task;

/// The key of `config.json` that names the architecture.
#[derive(Deserialize)]
struct ModelType {
    model_type: String,
}

/// The configuration of a checkpoint, by what its blocks compute.
enum EncoderConfig {
    /// BERT's blocks, under the names of a family.
    Bert(&'static EncoderFamily, BertConfig),
    ModernBert(ModernBertConfig),
}

/// The sizes that a configuration says.
#[derive(Clone, Copy)]
struct EncoderSizes {
    width: usize,
    vocabulary: usize,
    layers: usize,
    heads: usize,
    /// Tokens of the longest text that positions allow.
    positions: usize,
}

impl EncoderConfig {
    fn read(files: &CheckpointFiles) -> Result<Self, LoadError> {
        let ModelType { model_type } = files.json(CONFIG)?;
        let wrong = |problem: CheckpointProblem| files.wrong(CONFIG, problem);
        if model_type == modernbert::MODEL_TYPE {
            let config: ModernBertConfig = files.json(CONFIG)?;
            config.check().map_err(wrong)?;
            return Ok(Self::ModernBert(config));
        }
        let Some(family) = encoder_family::of_model_type(&model_type) else {
            let families = encoder_family::supported();
            let supported = format!("{families}, {} in a folder; others as a .gguf file", model_types());
            return Err(LoadError::Architecture { path: files.path(CONFIG), found: model_type, supported });
        };
        let config: BertConfig = match family.blocks {
            EncoderBlocks::Biased => files.json(CONFIG)?,
            EncoderBlocks::Rotary => nomic_config(files.json(CONFIG)?).map_err(wrong)?,
        };
        config.check(family).map_err(wrong)?;
        Ok(Self::Bert(family, config))
    }

    const fn model_type(&self) -> &'static str {
        match self {
            Self::Bert(family, _) => family.model_type,
            Self::ModernBert(_) => modernbert::MODEL_TYPE,
        }
    }

    fn is_classifier(&self) -> bool {
        match self {
            Self::Bert(_, config) => config.is_classifier(),
            Self::ModernBert(config) => config.is_classifier(),
        }
    }

    fn is_token_classifier(&self) -> bool {
        match self {
            Self::Bert(_, config) => config.is_token_classifier(),
            Self::ModernBert(config) => config.is_token_classifier(),
        }
    }

    fn sizes(&self) -> EncoderSizes {
        match self {
            Self::Bert(family, config) => EncoderSizes {
                width: config.hidden_size,
                vocabulary: config.vocab_size,
                layers: config.num_hidden_layers,
                heads: config.num_attention_heads,
                positions: config.positions(family),
            },
            Self::ModernBert(config) => EncoderSizes {
                width: config.hidden_size,
                vocabulary: config.vocab_size,
                layers: config.num_hidden_layers,
                heads: config.num_attention_heads,
                positions: config.max_position_embeddings,
            },
        }
    }

    /// How the rows of a text become the one that a classifier's head reads.
    fn classifier_pooling(&self) -> Pooling {
        match self {
            Self::Bert(..) => Pooling::Cls,
            Self::ModernBert(config) => config.classifier_pooling(),
        }
    }

    const fn head_activation(&self) -> HeadActivation {
        match self {
            Self::Bert(family, _) => family.head_activation,
            Self::ModernBert(_) => HeadActivation::Gelu,
        }
    }

    fn tensors(&self, head: Head, stored: &StoredTensors) -> Result<EncoderTensors, TensorProblem> {
        match self {
            Self::Bert(family, config) => EncoderShape { family, config, head }.tensors(stored),
            Self::ModernBert(config) => ModernBertShape { config, head }.tensors(stored),
        }
    }

    fn resolve(&self, head: Head, weights: &mut Weights) -> Result<Box<dyn Architecture>, TensorProblem> {
        match self {
            Self::Bert(family, config) => bert::resolve(&EncoderShape { family, config, head }, weights),
            Self::ModernBert(config) => ModernBertShape { config, head }.resolve(weights),
        }
    }
}

/// Reads and checks the checkpoint.
pub(crate) fn load(files: &CheckpointFiles, progress: &mut OnRead<'_>) -> Result<Model, LoadError> {
    let config = EncoderConfig::read(files)?;
    let sizes = config.sizes();
    let (scores, by_token) = (config.is_classifier(), config.is_token_classifier());
    let sentence = if scores {
        Sentence { pooling: config.classifier_pooling(), ..Sentence::of_classifier(files)? }
    } else if by_token {
        Sentence::of_token_classifier(files)?
    } else {
        Sentence::read(files)?
    };
    let tokenizer_file = files.bytes(TOKENIZER)?;
    files.refuse_foreign(TOKENIZER, &tokenizer_file)?;
    let tokenizer = Tokenizer::from_json(&tokenizer_file)
        .and_then(|tokenizer| check_vocabulary(tokenizer, sizes.vocabulary))
        .map_err(|problem| LoadError::Tokenizer { path: files.path(TOKENIZER), problem })?;
    let max_tokens =
        max_tokens(sizes.positions, &sentence, &tokenizer).map_err(|problem| files.wrong(CONFIG, problem))?;
    let (pooling, normalise) = (sentence.pooling, sentence.normalised);
    let head = Head { pooling, normalise, scores, by_token, max_tokens };
    let stored = files.tensors(progress)?;
    let tensors = config.tensors(head, &stored).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let mut weights = tensors.weights;
    // An architecture adds views of its tensors, which are no further parameters.
    let parameters = parameters(&weights);
    let architecture = config.resolve(head, &mut weights).map_err(|problem| files.wrong(WEIGHTS, problem))?;
    let score_head = match (&tensors.head_out, &tensors.label_bias) {
        (Some(out), _) => Some(
            ScoreHead::new(out, config.head_activation(), sizes.width)
                .map_err(|problem| files.wrong(WEIGHTS, problem))?,
        ),
        (None, Some(bias)) => Some(ScoreHead::of_labels(bias)),
        (None, None) => None,
    };
    let scoring = score_head.as_ref().map(|scores| scoring(files, scores.labels(), head)).transpose()?;
    let mut facts = facts(&config, head, &sentence, scoring);
    (facts.parameters, facts.file_bytes) = (parameters, stored.file_bytes() as u64);
    let (template, special) = chat::config::of_checkpoint(files)?;
    let chat = match &template {
        Some(template) => ChatTemplate::new(template, special),
        None => Err(ChatError::NoTemplate),
    };
    facts.chat_template = template;
    let preparation = TextPreparation { prompt: sentence.prompt, lowercase: sentence.lowercase, pair: None };
    let weights = Arc::new(weights);
    let sampling = SamplingSettings::default();
    let model = Model { weights, tokenizer, facts, architecture, chat, preparation, sampling, score_head };
    model.check_plan().map_err(|problem| LoadError::Plan { path: files.path(CONFIG), problem })?;
    Ok(model)
}

/// Elements of all weights.
fn parameters(weights: &Weights) -> u64 {
    weights.iter().map(|(_, weight)| weight.rows() as u64 * weight.cols() as u64).sum()
}

/// What the logits of a classifier mean.
fn scoring(files: &CheckpointFiles, labels: usize, head: Head) -> Result<Scoring, LoadError> {
    let config: HeadConfig = files.json(CONFIG)?;
    let scoring = if head.by_token { config.scoring_of_tokens(labels) } else { config.scoring(labels) };
    scoring.map_err(|problem| files.wrong(CONFIG, problem))
}

/// Texts are as long as the checkpoint says, and never longer than its table of positions.
fn max_tokens(
    positions: usize,
    sentence: &Sentence,
    tokenizer: &Tokenizer,
) -> Result<usize, CheckpointProblem> {
    let max_tokens = sentence.max_tokens.map_or(positions, |tokens| tokens.min(positions));
    let special = tokenizer.special_tokens();
    if max_tokens <= special {
        let why = format!(
            "a text may have {max_tokens} tokens (this key, or max_seq_length of sentence_bert_config.json), but the \
             {special} special tokens alone need them all"
        );
        return Err(CheckpointProblem::Malformed { key: "max_position_embeddings", why });
    }
    Ok(max_tokens)
}

/// More rows than tokens are fine; a token without a row is not.
fn check_vocabulary(tokenizer: Tokenizer, rows: usize) -> Result<Tokenizer, TokenizerProblem> {
    if tokenizer.len() <= rows {
        return Ok(tokenizer);
    }
    let why = format!("ids up to {} for vocab_size {rows} of config.json", tokenizer.len());
    Err(TokenizerProblem::Entry { key: "model.vocab", why })
}

/// All facts but the numbers of parameters and bytes.
fn facts(config: &EncoderConfig, head: Head, sentence: &Sentence, scoring: Option<Scoring>) -> ModelFacts {
    let EncoderSizes { width, vocabulary, layers, heads, .. } = config.sizes();
    let embedding = scoring.is_none().then(|| EmbeddingFacts {
        width,
        max_tokens: head.max_tokens,
        pooling: head.pooling,
        pooling_note: sentence.note.clone(),
        normalised: head.normalise,
        prompt: sentence.prompt.clone(),
        shortest: None,
    });
    let task = scoring.as_ref().map_or(Task::Embed, |scoring| scoring.task);
    let by_token = head.by_token;
    let classification = scoring.map(|Scoring { activation, labels, .. }| {
        let width = if by_token { labels.len() } else { width };
        ClassificationFacts { width, labels, activation, by_token }
    });
    ModelFacts {
        task,
        architecture: config.model_type().to_owned(),
        name: None,
        parameters: 0,
        context_tokens: head.max_tokens,
        vocabulary,
        layers,
        kv_heads: heads,
        head_dim: width / heads,
        file_bytes: 0,
        embedding,
        classification,
        chat_template: None,
        warnings: Vec::new(),
    }
}
