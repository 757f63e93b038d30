//! Picks a model's files from its source, of this machine or listed by a server.
//!
//! Without patterns a folder must hold exactly one `.gguf` file, or none and a checkpoint: guessing between
//! two would serve the wrong model half of the time. With patterns each one must pick something, since a
//! pattern that picks nothing is a slip.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use globset::GlobBuilder;

use crate::digest::{Digest, HashProgress, hash_files};
use crate::error::StoreError;
use crate::source::Source;

/// Files that are looked at in one source; the largest models have a few hundred.
pub(crate) const MAX_FILES: usize = 10_000;
/// Folders within folders that are looked into.
const MAX_DEPTH: usize = 8;
/// Folders within folders that belong to a checkpoint: its own, and one for each module of
/// sentence-transformers.
const CHECKPOINT_DEPTH: usize = 2;
/// The weights of a checkpoint, which make its folder one.
const CHECKPOINT_WEIGHTS: &str = "model.safetensors";
/// The list of files of weights that are split, which makes its folder one, too.
const SHARDS_INDEX: &str = "model.safetensors.index.json";
/// The chat template of newer checkpoints.
const CHAT_TEMPLATE: &str = "chat_template.jinja";
/// The template for conversations with tools, where it is another one.
const TOOLS_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";
/// Names that a message lists.
const LISTED: usize = 12;

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFile {
    /// Path below the source's folder, with `/` between its parts; for a source that is one file, its name.
    pub name: String,
    /// Where to open it.
    pub path: PathBuf,
    /// Its size in bytes when it was picked.
    pub bytes: u64,
}

/// The files that make up a model, sorted by name; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    files: Vec<ModelFile>,
}

impl Source {
    /// Picks the model's files: the source itself where it is a file; what `patterns` match below it where it
    /// is a folder (`*` stays within a folder, `**` does not); without patterns its only `.gguf` file, or
    /// where there is none the weights of a checkpoint, in one file or several, its `.json` files and its
    /// chat template.
    ///
    /// # Errors
    /// A source that does not exist or cannot be read, or a choice that is empty or not clear.
    pub fn resolve(&self, patterns: &[String]) -> Result<Resolved, StoreError> {
        let Some(root) = self.path() else {
            return Err(StoreError::NotFetched { text: self.to_string() });
        };
        let meta = fs::metadata(root).map_err(|error| StoreError::io(root, error))?;
        if meta.is_dir() {
            let listed = &mut |depth| walk(root, depth);
            return Ok(Resolved { files: pick(root, patterns, listed)? });
        }
        if !meta.is_file() {
            return Err(StoreError::NotAFile { path: root.to_owned() });
        }
        if !patterns.is_empty() {
            return Err(StoreError::PatternsForFile { path: root.to_owned() });
        }
        let name = utf8(root.file_name().map_or(root, Path::new), root)?;
        Ok(Resolved { files: vec![ModelFile { name, path: root.to_owned(), bytes: meta.len() }] })
    }
}

impl Resolved {
    pub(crate) fn of(files: Vec<ModelFile>) -> Self {
        Self { files }
    }

    /// The files, sorted by name.
    pub fn files(&self) -> &[ModelFile] {
        &self.files
    }

    /// Size of all files in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads every file once and gives the model's digest. `progress` is called after every MiB or so.
    ///
    /// # Errors
    /// A file that cannot be read or has gone.
    pub fn digest(&self, progress: &mut dyn FnMut(HashProgress)) -> Result<Digest, StoreError> {
        self.digest_while(&mut |hashed| {
            progress(hashed);
            ControlFlow::Continue(())
        })
    }

    /// [`Self::digest`], which ends early where `progress` says so.
    ///
    /// # Errors
    /// As [`Self::digest`], and [`StoreError::Stopped`].
    pub fn digest_while(
        &self,
        progress: &mut dyn FnMut(HashProgress) -> ControlFlow<()>,
    ) -> Result<Digest, StoreError> {
        hash_files(&self.files, self.total_bytes(), progress)
    }
}

/// Lists the files of a folder down to a depth; 1 is the folder itself.
pub(crate) type List<'a> = &'a mut dyn FnMut(usize) -> Result<Vec<ModelFile>, StoreError>;

/// Picks the model's files out of a folder, here or elsewhere. `root` is its name in messages.
pub(crate) fn pick(root: &Path, patterns: &[String], list: List<'_>) -> Result<Vec<ModelFile>, StoreError> {
    if patterns.is_empty() { only_model_file(root, list) } else { matching(root, patterns, list) }
}

/// [`pick`] among files that are listed already: of a remote folder, or of an artifact.
pub(crate) fn pick_listed(
    root: &Path,
    patterns: &[String],
    all: &[ModelFile],
) -> Result<Vec<ModelFile>, StoreError> {
    if all.len() > MAX_FILES {
        return Err(StoreError::TooManyFiles { folder: root.to_owned(), limit: MAX_FILES });
    }
    let is_within = |file: &&ModelFile, depth: usize| file.name.split('/').count() <= depth;
    pick(root, patterns, &mut |depth| Ok(all.iter().filter(|file| is_within(file, depth)).cloned().collect()))
}

fn only_model_file(folder: &Path, list: List<'_>) -> Result<Vec<ModelFile>, StoreError> {
    let all = list(1)?;
    let is_model = |file: &&ModelFile| file.name.to_ascii_lowercase().ends_with(".gguf");
    let found: Vec<ModelFile> = all.iter().filter(is_model).cloned().collect();
    match found.len() {
        1 => Ok(found),
        count if count > 1 && are_parts(found.iter().map(|file| file.name.as_str())) => Ok(found),
        0 if all.iter().any(|file| [CHECKPOINT_WEIGHTS, SHARDS_INDEX].contains(&file.name.as_str())) => {
            Ok(checkpoint(list(CHECKPOINT_DEPTH)?))
        }
        0 => Err(match other_weights(&all) {
            Some(found) => StoreError::OtherWeights { folder: folder.to_owned(), found: found.to_owned() },
            None => StoreError::NoModelFile { folder: folder.to_owned(), holds: names(&all) },
        }),
        _ => Err(StoreError::SeveralModelFiles { folder: folder.to_owned(), found: names(&found) }),
    }
}

/// Whether files are all parts of one model, `NAME-00001-of-00003.gguf` and so on, in their order.
pub fn are_parts<'n>(names: impl Iterator<Item = &'n str>) -> bool {
    let names: Vec<&str> = names.collect();
    let Some((start, _)) = names.first().and_then(|name| name.rsplit_once("-00001-of-")) else {
        return false;
    };
    let count = names.len();
    let mut numbered = names.iter().zip(1..);
    numbered.all(|(name, number)| *name == format!("{start}-{number:05}-of-{count:05}.gguf"))
}

/// A file of weights that is not read: one of several, or in another format.
fn other_weights(files: &[ModelFile]) -> Option<&str> {
    let begins = ["model-", "pytorch_model", "tf_model", "flax_model"];
    let ends = [".safetensors", ".bin", ".h5", ".msgpack", ".index.json"];
    let names = files.iter().map(|file| file.name.as_str());
    let mut weights = names.filter(|name| begins.iter().any(|word| name.starts_with(word)));
    weights.find(|name| ends.iter().any(|end| name.ends_with(end)))
}

/// Weights and descriptions; the descriptions decide what the weights compute, so they count in the digest.
fn checkpoint(mut files: Vec<ModelFile>) -> Vec<ModelFile> {
    // Where the weights are there as a whole, their parts are not read.
    let is_whole = files.iter().any(|file| file.name == CHECKPOINT_WEIGHTS);
    let is_shard = |name: &str| !is_whole && name.starts_with("model-") && name.ends_with(".safetensors");
    files.retain(|file| {
        let name = file.name.as_str();
        let is_named = [CHECKPOINT_WEIGHTS, CHAT_TEMPLATE, TOOLS_TEMPLATE].contains(&name);
        is_named || is_shard(name) || name.ends_with(".json")
    });
    files
}

fn matching(folder: &Path, patterns: &[String], list: List<'_>) -> Result<Vec<ModelFile>, StoreError> {
    let all = list(MAX_DEPTH)?;
    let mut picked: Vec<ModelFile> = Vec::new();
    for pattern in patterns {
        let glob = GlobBuilder::new(pattern).literal_separator(true).build().map_err(|error| {
            StoreError::InvalidPattern { pattern: pattern.clone(), why: error.kind().to_string() }
        })?;
        let matcher = glob.compile_matcher();
        let before = picked.len();
        let known = all.iter().any(|file| matcher.is_match(&file.name));
        if !known {
            return Err(StoreError::NothingMatches {
                pattern: pattern.clone(),
                folder: folder.to_owned(),
                holds: names(&all),
            });
        }
        let new = all.iter().filter(|file| matcher.is_match(&file.name));
        let new: Vec<ModelFile> = new.filter(|file| !picked[..before].contains(file)).cloned().collect();
        picked.extend(new);
    }
    picked.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(picked)
}

/// Every file below `root`, sorted by name. Entries that begin with `..` are left out: kubelet keeps the
/// versions of a mounted volume there, and they would show each file twice.
fn walk(root: &Path, depth: usize) -> Result<Vec<ModelFile>, StoreError> {
    let mut files = Vec::new();
    let mut folders = vec![(root.to_owned(), String::new(), depth)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| StoreError::io(&folder, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| StoreError::io(&folder, error))?;
            let path = entry.path();
            let name = utf8(Path::new(&entry.file_name()), &path)?;
            if name.starts_with("..") {
                continue;
            }
            let meta = fs::metadata(&path).map_err(|error| StoreError::io(&path, error))?;
            let name = format!("{prefix}{name}");
            if meta.is_file() {
                files.push(ModelFile { name, path, bytes: meta.len() });
            } else if meta.is_dir() && depth > 1 {
                folders.push((path, format!("{name}/"), depth - 1));
            }
            if files.len() + folders.len() > MAX_FILES {
                return Err(StoreError::TooManyFiles { folder: root.to_owned(), limit: MAX_FILES });
            }
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn utf8(name: &Path, path: &Path) -> Result<String, StoreError> {
    name.to_str().map(str::to_owned).ok_or_else(|| StoreError::NameNotUtf8 { path: path.to_owned() })
}

fn names(files: &[ModelFile]) -> Vec<String> {
    let mut names: Vec<String> = files.iter().take(LISTED).map(|file| file.name.clone()).collect();
    if files.len() > LISTED {
        names.push(format!("and {} more", files.len() - LISTED));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    fn folder(files: &[&str]) -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file.as_bytes()).unwrap();
        }
        folder
    }

    fn picked(folder: &TempDir, patterns: &[&str]) -> Result<Vec<String>, StoreError> {
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        let resolved = Source::from_path(folder.path()).resolve(&patterns)?;
        Ok(resolved.files().iter().map(|file| file.name.clone()).collect())
    }

    #[test]
    fn a_folder_gives_its_only_model_file() {
        assert_eq!(picked(&folder(&["README.md", "m.GGUF", "sub/other.gguf"]), &[]).unwrap(), ["m.GGUF"]);
    }

    #[test]
    fn a_folder_without_one_gives_its_checkpoint() {
        let files = ["config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"];
        let mut all = vec!["README.md", "pytorch_model.bin", "onnx/deep/config.json"];
        all.extend(files);
        let picked_files = picked(&folder(&all), &[]).unwrap();
        assert_eq!(
            picked_files,
            ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
        );
        all.push("m.gguf");
        assert_eq!(picked(&folder(&all), &[]).unwrap(), ["m.gguf"]);
    }

    #[test]
    fn all_parts_of_a_model_are_picked_and_some_are_not() {
        let parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
        assert_eq!(picked(&folder(&parts), &[]).unwrap(), parts);
        let names = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"];
        assert!(matches!(picked(&folder(&names), &[]), Err(StoreError::SeveralModelFiles { .. })));
        assert!(!are_parts(["a-00001-of-00002.gguf", "b-00002-of-00002.gguf"].into_iter()));
    }

    #[test]
    fn weights_may_be_split_over_files() {
        let parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let mut all = vec!["chat_template.jinja", "config.json", "model.safetensors.index.json", "README.md"];
        all.extend([parts[0], parts[1], "additional_chat_templates/tool_use.jinja"]);
        let mut expected = vec![TOOLS_TEMPLATE, "chat_template.jinja", "config.json", parts[0], parts[1]];
        expected.push("model.safetensors.index.json");
        assert_eq!(picked(&folder(&all), &[]).unwrap(), expected);
        all.push("model.safetensors");
        let whole = picked(&folder(&all), &[]).unwrap();
        assert!(!whole.contains(&parts[0].to_owned()) && whole.contains(&"model.safetensors".to_owned()));
        let unlisted = picked(&folder(&parts), &[]).unwrap_err();
        assert!(unlisted.to_string().contains("model-00001-of-00002.safetensors"), "{unlisted}");
    }

    #[test]
    fn no_model_file_or_several_are_errors_that_list_the_files() {
        let none = picked(&folder(&["README.md"]), &[]).unwrap_err();
        assert!(none.to_string().contains("README.md"), "{none}");
        let empty = picked(&folder(&[]), &[]).unwrap_err();
        assert!(empty.to_string().contains("holds: nothing"), "{empty}");
        let several = picked(&folder(&["b.gguf", "a.gguf", "c.txt"]), &[]).unwrap_err();
        assert!(several.to_string().ends_with("a.gguf, b.gguf"), "{several}");
    }

    #[test]
    fn patterns_pick_by_name_and_star_stays_in_its_folder() {
        let folder = folder(&["m-Q4_1.gguf", "m-Q8_0.gguf", "sub/m-Q4_1.gguf", "t.json"]);
        assert_eq!(picked(&folder, &["*Q4_1.gguf"]).unwrap(), ["m-Q4_1.gguf"]);
        assert_eq!(picked(&folder, &["**/*Q4_1.gguf"]).unwrap(), ["m-Q4_1.gguf", "sub/m-Q4_1.gguf"]);
        let both = picked(&folder, &["t.json", "*Q8_0.gguf", "*.json"]).unwrap();
        assert_eq!(both, ["m-Q8_0.gguf", "t.json"], "each file once, sorted");
    }

    #[test]
    fn a_pattern_that_picks_nothing_or_cannot_be_read_is_an_error() {
        let folder = folder(&["a.gguf"]);
        let nothing = picked(&folder, &["*.gguf", "*.bin"]).unwrap_err();
        assert!(nothing.to_string().contains("*.bin") && nothing.to_string().contains("a.gguf"), "{nothing}");
        assert!(matches!(picked(&folder, &["["]), Err(StoreError::InvalidPattern { .. })));
    }

    #[test]
    fn a_file_is_itself_and_takes_no_patterns() {
        let folder = folder(&["any.name"]);
        let source = Source::from_path(folder.path().join("any.name"));
        assert_eq!(source.resolve(&[]).unwrap().files()[0].name, "any.name");
        assert!(matches!(source.resolve(&["*".into()]), Err(StoreError::PatternsForFile { .. })));
    }

    #[test]
    fn what_may_never_end_is_refused_before_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("m.gguf");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        for path in [socket.as_path(), Path::new("/dev/zero")] {
            let error = Source::from_path(path).resolve(&[]).unwrap_err();
            assert!(matches!(error, StoreError::NotAFile { .. }), "{error}");
        }
        // In a folder it is no file to pick.
        assert!(matches!(picked(&folder, &[]), Err(StoreError::NoModelFile { .. })));
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = Source::from_path("/no/such/model.gguf").resolve(&[]).unwrap_err();
        assert_eq!(error.reason(), "SourceNotFound");
        assert!(error.to_string().contains("/no/such/model.gguf"));
    }

    #[test]
    fn a_volume_as_kubelet_mounts_it_shows_each_file_once() {
        let folder = folder(&["..2026_01/m.gguf"]);
        std::os::unix::fs::symlink("..2026_01", folder.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/m.gguf", folder.path().join("m.gguf")).unwrap();
        assert_eq!(picked(&folder, &["**/*.gguf"]).unwrap(), ["m.gguf"]);
    }
}
