//! Layers that are archives: each file becomes a file of the cache.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Write as _};
use std::path::{Component, Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tar::{Archive, EntryType};

use crate::cache::CacheDir;
use crate::digest::Digest;
use crate::error::StoreError;
use crate::lock::Lease;
use crate::origin::Packing;
use crate::select::MAX_FILES;

/// Bytes copied at once.
const BLOCK_BYTES: usize = 1 << 20;
/// Links that are followed from one to the next.
const MAX_LINKS: usize = 8;
/// Marks a file of an earlier layer as removed.
const WHITEOUT: &str = ".wh.";

/// A file of the cache that a source calls `name`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CachedFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

/// What a layer holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnpackedLayer {
    pub(crate) files: Vec<CachedFile>,
    /// Names that earlier layers have and the artifact has not.
    pub(crate) removed: Vec<String>,
}

/// An unpacked layer, whose files stay while this does.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) layer: UnpackedLayer,
    pub(crate) leases: Vec<Lease>,
}

struct Stored {
    file: CachedFile,
    lease: Lease,
}

impl CachedFile {
    pub(crate) fn digest(&self) -> Option<Digest> {
        Digest::from_hex(&self.sha256)
    }
}

/// Unpacks a layer into the cache. `what` is its name in messages.
pub(crate) fn unpack(
    cache: &CacheDir,
    layer: &Path,
    packing: Packing,
    what: &str,
) -> Result<Unpacked, StoreError> {
    let file = File::open(layer).map_err(|error| StoreError::cache(layer, "opening", error))?;
    let file = BufReader::with_capacity(BLOCK_BYTES, file);
    let invalid =
        |error: io::Error| StoreError::InvalidArchive { what: what.to_owned(), why: error.to_string() };
    let reader: Box<dyn Read> = match packing {
        Packing::Tar => Box::new(file),
        Packing::TarGzip => Box::new(MultiGzDecoder::new(file)),
        Packing::TarZstd => Box::new(zstd::Decoder::with_buffer(file).map_err(invalid)?),
    };
    let mut files = BTreeMap::new();
    let mut links = BTreeMap::new();
    let mut removed = Vec::new();
    let mut leases = Vec::new();
    let mut archive = Archive::new(reader);
    for entry in archive.entries().map_err(invalid)? {
        let mut entry = entry.map_err(invalid)?;
        let path = entry.path().map_err(invalid)?.into_owned();
        let Some(name) = normal(Path::new(""), &path) else {
            let why = format!("it holds the path {}, which leaves its folder", path.display());
            return Err(StoreError::InvalidArchive { what: what.to_owned(), why });
        };
        let (folder, last) = name.rsplit_once('/').unwrap_or(("", &name));
        if let Some(hidden) = last.strip_prefix(WHITEOUT) {
            let is_whole_folder = hidden.starts_with(WHITEOUT);
            let target = if is_whole_folder { String::new() } else { hidden.to_owned() };
            removed.push(
                [folder, &target].into_iter().filter(|text| !text.is_empty()).collect::<Vec<_>>().join("/"),
            );
            continue;
        }
        match entry.header().entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                cache.make_room(entry.size(), &[])?;
                let stored = store(cache, &mut entry, name.clone(), what)?;
                files.insert(name, stored.file);
                leases.push(stored.lease);
            }
            kind @ (EntryType::Link | EntryType::Symlink) => {
                let target = entry.link_name().map_err(invalid)?.map(std::borrow::Cow::into_owned);
                let from = if kind == EntryType::Symlink { folder } else { "" };
                if let Some(target) = target.and_then(|target| normal(Path::new(from), &target)) {
                    links.insert(name, target);
                }
            }
            _ => {}
        }
        if files.len() + links.len() > MAX_FILES {
            return Err(StoreError::TooManyFiles { folder: what.into(), limit: MAX_FILES });
        }
    }
    let mut all: Vec<CachedFile> = files.values().cloned().collect();
    for (name, first) in &links {
        let mut target = first;
        for _ in 0..MAX_LINKS {
            let Some(next) = links.get(target) else { break };
            target = next;
        }
        if let Some(file) = files.get(target) {
            all.push(CachedFile { name: name.clone(), ..file.clone() });
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Unpacked { layer: UnpackedLayer { files: all, removed }, leases })
}

/// Puts a layer over the files of earlier ones.
pub(crate) fn add_layer(files: &mut BTreeMap<String, CachedFile>, layer: &UnpackedLayer) {
    for removed in &layer.removed {
        let is_below = |name: &str| {
            removed.is_empty()
                || name
                    .strip_prefix(removed.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        files.retain(|name, _| !is_below(name));
    }
    files.extend(layer.files.iter().map(|file| (file.name.clone(), file.clone())));
}

fn store(cache: &CacheDir, from: &mut dyn Read, name: String, what: &str) -> Result<Stored, StoreError> {
    let mut temporary = cache.temporary()?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK_BYTES];
    let mut bytes = 0;
    loop {
        let count = match from.read(&mut block) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                let why = format!("{name}: {error}");
                return Err(StoreError::InvalidArchive { what: what.to_owned(), why });
            }
        };
        hasher.update(&block[..count]);
        let written = temporary.file().write_all(&block[..count]);
        written.map_err(|error| StoreError::cache(&name, "writing", error))?;
        bytes += count as u64;
    }
    let digest = Digest::of(hasher);
    let lease = cache.install_temporary(temporary, &digest)?;
    Ok(Stored { file: CachedFile { name, bytes, sha256: digest.to_string() }, lease })
}

/// A path below `folder` as a name with `/`, without `.` and `..`; none where it leaves the root. Archives of
/// images may write paths from the root.
fn normal(folder: &Path, path: &Path) -> Option<String> {
    let joined: PathBuf = folder.join(path.strip_prefix("/").unwrap_or(path));
    let mut segments: Vec<&str> = Vec::new();
    for component in joined.components() {
        match component {
            Component::Normal(segment) => segments.push(segment.to_str()?),
            Component::ParentDir => {
                segments.pop()?;
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Some(segments.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            let is_file = *kind == EntryType::Regular;
            header.set_size(if is_file { content.len() as u64 } else { 0 });
            // The name is written as it is: the builder refuses what a hostile archive holds.
            header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
            if !is_file {
                header.as_gnu_mut().unwrap().linkname[..content.len()].copy_from_slice(content.as_bytes());
            }
            header.set_cksum();
            builder.append(&header, if is_file { content.as_bytes() } else { b"" }).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpacked(entries: &[(&str, EntryType, &str)]) -> Result<UnpackedLayer, StoreError> {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let path = folder.path().join("layer");
        std::fs::write(&path, archive(entries)).unwrap();
        let layer = unpack(&cache, &path, Packing::Tar, "layer")?.layer;
        for file in &layer.files {
            let content = std::fs::read(cache.blob_path(&file.digest().unwrap())).unwrap();
            assert_eq!(file.digest(), Some(Digest::of_bytes(&content)));
        }
        Ok(layer)
    }

    #[test]
    fn files_and_links_become_files_of_the_cache() {
        let layer = unpacked(&[
            ("./m/config.json", EntryType::Regular, "{}"),
            ("/m/blob", EntryType::Regular, "weights"),
            ("m/model.gguf", EntryType::Symlink, "../m/blob"),
            ("m/hard", EntryType::Link, "m/model.gguf"),
            ("m/dangling", EntryType::Symlink, "/etc/none"),
        ])
        .unwrap();
        let names: Vec<&str> = layer.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["m/blob", "m/config.json", "m/hard", "m/model.gguf"]);
        assert!(layer.files.iter().filter(|file| file.bytes == 7).count() == 3);
    }

    #[test]
    fn a_path_that_leaves_its_folder_and_a_cut_archive_are_refused() {
        let error = unpacked(&[("m/../../x", EntryType::Regular, "x")]).unwrap_err();
        assert!(error.to_string().contains("leaves its folder"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(folder.path(), None).unwrap();
        let path = folder.path().join("layer");
        let whole = archive(&[("m.gguf", EntryType::Regular, &"x".repeat(2000))]);
        std::fs::write(&path, &whole[..1500]).unwrap();
        let error = unpack(&cache, &path, Packing::Tar, "layer").unwrap_err();
        assert_eq!(error.reason(), "InvalidArtifact", "{error}");
        std::fs::write(&path, b"not gzip").unwrap();
        let error = unpack(&cache, &path, Packing::TarGzip, "layer").unwrap_err();
        assert_eq!(error.reason(), "InvalidArtifact", "{error}");
    }

    #[test]
    fn later_layers_remove_and_replace_files_of_earlier_ones() {
        let of = |entries: &[(&str, EntryType, &str)]| unpacked(entries).unwrap();
        let mut files = BTreeMap::new();
        let regular = EntryType::Regular;
        add_layer(&mut files, &of(&[("a", regular, "1"), ("d/b", regular, "2"), ("d/c", regular, "3")]));
        add_layer(&mut files, &of(&[(".wh.a", regular, ""), ("d/b", regular, "new")]));
        assert_eq!(files.keys().collect::<Vec<_>>(), ["d/b", "d/c"]);
        assert_eq!(files["d/b"].bytes, 3);
        add_layer(&mut files, &of(&[("d/.wh..wh..opq", regular, ""), ("d/e", regular, "4")]));
        assert_eq!(files.keys().collect::<Vec<_>>(), ["d/e"]);
    }
}
