//! Checkpoints: folders of `config.json`, `model.safetensors` and `tokenizer.json`, as model hubs hold them,
//! with the files of sentence-transformers beside them where the model gives embeddings.
//!
//! All of it comes from outside. The safetensors library checks every offset against the file before a tensor
//! is used. A JSON key that changes what a model computes and is not supported is refused by name.

mod classifier;
mod config;
pub(crate) mod decoder;
mod encoder_checks;
mod error;
mod json;
mod modernbert;
mod nomic;
pub(crate) mod quantised;
mod sentence;
pub(crate) mod tensor_names;

pub use error::CheckpointProblem;

pub(crate) use classifier::{HeadConfig, Scoring};
pub(crate) use config::BertConfig;
pub(crate) use decoder::DecoderConfig;
pub(crate) use modernbert::{LayerAttention, ModernBertConfig};
pub(crate) use nomic::nomic_config;
pub(crate) use sentence::Sentence;

use crate::error::LoadError;
use crate::foreign::ForeignFile;
use crate::source::{self, OnRead, ReadProgress};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use trustformers_plan::{DType, WeightBytes};
use trustformers_proto::Task;

/// Sizes, architecture and behaviour of the transformer.
pub(crate) const CONFIG: &str = "config.json";
/// The weights.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// What the tokenizer's class was configured with: limits, special tokens, perhaps a chat template.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The tokenizer, as the tokenizers library writes it.
pub(crate) const TOKENIZER: &str = "tokenizer.json";

/// The list of files of weights that are split.
const SHARDS_INDEX: &str = "model.safetensors.index.json";

/// Most bytes of a JSON or text file. The largest known vocabularies, of half a million tokens, take some 20
/// MiB as `tokenizer.json`; reading one takes about ten times its size for a moment.
const MAX_TEXT_BYTES: u64 = 48 << 20;

/// Bytes before a safetensors header: its length as an integer of 64 bits.
const HEADER_LENGTH_BYTES: usize = 8;

/// Depth of the folders that are read: the checkpoint's own, and one for each module of
/// sentence-transformers.
const FOLDER_DEPTH: usize = 2;

/// The files of a checkpoint by their path below its folder, with `/` between the parts. No other file of the
/// folder is read: the caller that selected and pinned files decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointFiles {
    folder: PathBuf,
    files: BTreeMap<String, PathBuf>,
    asked: Option<Task>,
}

impl CheckpointFiles {
    /// These files of a folder. The folder is for messages about a file that is missing.
    pub fn new(folder: impl Into<PathBuf>, files: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        Self { folder: folder.into(), files: files.into_iter().collect(), asked: None }
    }

    /// The same, asked for a task. It decides only where the files of one model serve two tasks: a decoder
    /// that ranks by its words has the files of one that generates.
    #[must_use]
    pub fn asked_for(self, task: Option<Task>) -> Self {
        Self { asked: task, ..self }
    }

    /// The task that was asked for.
    pub(crate) fn asked(&self) -> Option<Task> {
        self.asked
    }

    /// Every file of a folder and of the folders in it.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn of_folder(folder: &Path) -> Result<Self, LoadError> {
        let mut files = BTreeMap::new();
        let mut folders = vec![(folder.to_owned(), String::new(), FOLDER_DEPTH)];
        while let Some((path, prefix, depth)) = folders.pop() {
            let io = |source| LoadError::Io { path: path.clone(), action: "read", source };
            for entry in std::fs::read_dir(&path).map_err(io)? {
                let entry = entry.map_err(io)?;
                // No file of a checkpoint has a name that is not text.
                let Some(name) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else {
                    continue;
                };
                let path = entry.path();
                if path.is_file() {
                    files.insert(name, path);
                } else if path.is_dir() && depth > 1 {
                    folders.push((path, format!("{name}/"), depth - 1));
                }
            }
        }
        Ok(Self { folder: folder.to_owned(), files, asked: None })
    }

    /// The path of a file, or the path where it should be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.files.get(name).cloned().unwrap_or_else(|| self.folder.join(name))
    }

    /// A problem in the file `name`.
    pub(crate) fn wrong(&self, name: &str, problem: impl Into<CheckpointProblem>) -> LoadError {
        LoadError::Checkpoint { path: self.path(name), problem: problem.into() }
    }

    /// The bytes of a file that must be there.
    pub(crate) fn bytes(&self, name: &'static str) -> Result<Vec<u8>, LoadError> {
        self.optional_bytes(name)?.ok_or_else(|| self.wrong(name, CheckpointProblem::Missing))
    }

    /// The content of a JSON file that must be there.
    pub(crate) fn json<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, LoadError> {
        json::parse(&self.bytes(name)?).map_err(|problem| self.wrong(name, problem))
    }

    /// The content of a JSON file that may be missing.
    pub(crate) fn optional_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, LoadError> {
        let Some(bytes) = self.optional_bytes(name)? else { return Ok(None) };
        json::parse(&bytes).map(Some).map_err(|problem| self.wrong(name, problem))
    }

    /// Refuses a text file that holds something else than its name says.
    pub(crate) fn refuse_foreign(&self, name: &str, content: &[u8]) -> Result<(), LoadError> {
        match ForeignFile::of_text(content) {
            None => Ok(()),
            Some(foreign) => Err(self.wrong(name, CheckpointProblem::Foreign(foreign))),
        }
    }

    /// The content of a text file that may be missing.
    pub(crate) fn optional_text(&self, name: &str) -> Result<Option<String>, LoadError> {
        let Some(bytes) = self.optional_bytes(name)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|_| self.wrong(name, CheckpointProblem::NotText))
    }

    fn optional_bytes(&self, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
        let Some(path) = self.files.get(name) else { return Ok(None) };
        let io = |source| LoadError::Io { path: path.clone(), action: "read", source };
        let (file, bytes) = source::open_file(path)?;
        let mut content = Vec::new();
        // One byte more than is allowed shows a file that has grown since its size was read.
        file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut content).map_err(io)?;
        if content.len() as u64 > MAX_TEXT_BYTES {
            return Err(self.wrong(name, CheckpointProblem::TooLarge { bytes, most: MAX_TEXT_BYTES }));
        }
        Ok(Some(content))
    }

    /// The weights, mapped, and the place of each tensor in them.
    pub(crate) fn tensors(&self, progress: &mut OnRead<'_>) -> Result<StoredTensors, LoadError> {
        self.tensors_in(WEIGHTS, self.no_weights(), progress)
    }

    /// The file of tensors of that name, mapped; `missing` is the problem where it is not there.
    pub(crate) fn tensors_in(
        &self,
        name: &str,
        missing: CheckpointProblem,
        progress: &mut OnRead<'_>,
    ) -> Result<StoredTensors, LoadError> {
        let path = self.files.get(name).ok_or_else(|| self.wrong(name, missing))?;
        let source = source::open(path, progress)?;
        StoredTensors::parse(source).map_err(|problem| self.wrong(name, problem))
    }

    /// The weights in one file, or in the files that their list names, mapped.
    pub(crate) fn shards(&self, progress: &mut OnRead<'_>) -> Result<Vec<Shard>, LoadError> {
        let names = self.shard_names()?;
        let mut total_bytes = 0;
        for name in &names {
            let path =
                self.files.get(name).ok_or_else(|| self.wrong(name, CheckpointProblem::MissingShard))?;
            total_bytes += source::open_file(path)?.1;
        }
        let (mut shards, mut before) = (Vec::new(), 0);
        for name in names {
            let mut of_file = |read: ReadProgress| -> ControlFlow<()> {
                progress(ReadProgress { bytes: before + read.bytes, total_bytes })
            };
            let source = source::open(&self.path(&name), &mut of_file)?;
            before += (*source).as_ref().len() as u64;
            let stored = StoredTensors::parse(source).map_err(|problem| self.wrong(&name, problem))?;
            shards.push(Shard { name, stored });
        }
        Ok(shards)
    }

    /// The files of the weights, each once.
    fn shard_names(&self) -> Result<Vec<String>, LoadError> {
        if self.files.contains_key(WEIGHTS) {
            return Ok(vec![WEIGHTS.to_owned()]);
        }
        let Some(ShardsIndex { weight_map }) = self.optional_json(SHARDS_INDEX)? else {
            return Err(self.wrong(WEIGHTS, self.no_weights()));
        };
        let names: BTreeSet<String> = weight_map.into_values().collect();
        if names.is_empty() {
            let why = "it names no file".to_owned();
            return Err(self.wrong(SHARDS_INDEX, CheckpointProblem::key("weight_map", why)));
        }
        Ok(names.into_iter().collect())
    }

    fn no_weights(&self) -> CheckpointProblem {
        let find = |is: fn(&str) -> bool| self.files.keys().find(|name| is(name)).cloned();
        let shards =
            find(|name| name == SHARDS_INDEX || (name.starts_with("model-") && name.contains("-of-")));
        let other = || {
            find(|name| {
                let weights =
                    ["pytorch_model", "tf_model", "flax_model"].iter().any(|word| name.starts_with(word));
                weights && [".bin", ".h5", ".msgpack", ".json"].iter().any(|end| name.ends_with(end))
            })
        };
        match (shards, other()) {
            (Some(found), _) => CheckpointProblem::Shards { found },
            (None, Some(found)) => CheckpointProblem::OtherWeights { found },
            (None, None) => CheckpointProblem::Missing,
        }
    }
}

/// The list of files of weights that are split.
#[derive(Deserialize)]
struct ShardsIndex {
    /// The file of each tensor.
    weight_map: BTreeMap<String, String>,
}

/// One file of weights.
pub(crate) struct Shard {
    /// Its path below the checkpoint's folder.
    pub(crate) name: String,
    pub(crate) stored: StoredTensors,
}

/// A file of tensors. The place of each was checked against the file.
pub(crate) struct StoredTensors {
    pub(crate) source: WeightBytes,
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
}

/// One tensor of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredTensor {
    /// How it is stored; `None` where weights cannot have that type.
    pub(crate) dtype: Option<DType>,
    /// The type's name in the file.
    pub(crate) stored_as: String,
    /// Rows and columns: all dimensions but the last are rows, a vector has one.
    pub(crate) matrix: (usize, usize),
    /// The bytes within the file.
    pub(crate) range: Range<usize>,
}

impl StoredTensors {
    fn parse(source: WeightBytes) -> Result<Self, CheckpointProblem> {
        let bytes: &[u8] = (*source).as_ref();
        let (header_bytes, metadata) = SafeTensors::read_metadata(bytes).map_err(|error| {
            let foreign = ForeignFile::of(bytes).map(CheckpointProblem::Foreign);
            foreign.unwrap_or_else(|| CheckpointProblem::Safetensors(error.to_string()))
        })?;
        // Both fit: the library has found the header, and after it all data, within the file.
        let data = HEADER_LENGTH_BYTES + header_bytes;
        let tensors = tensors(&metadata, data);
        Ok(Self { source, tensors })
    }

    /// Size of the file in bytes.
    pub(crate) fn file_bytes(&self) -> usize {
        (*self.source).as_ref().len()
    }
}

fn tensors(metadata: &Metadata, data: usize) -> BTreeMap<String, StoredTensor> {
    let stored = |info: &TensorInfo| StoredTensor {
        dtype: dtype(info.dtype),
        stored_as: format!("{:?}", info.dtype),
        matrix: match info.shape.split_last() {
            Some((cols, rows)) => (rows.iter().product(), *cols),
            None => (1, 1),
        },
        range: data + info.data_offsets.0..data + info.data_offsets.1,
    };
    metadata.tensors().into_iter().map(|(name, info)| (name, stored(info))).collect()
}

fn dtype(stored: Dtype) -> Option<DType> {
    match stored {
        Dtype::F32 => Some(DType::F32),
        Dtype::F16 => Some(DType::F16),
        Dtype::BF16 => Some(DType::BF16),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
