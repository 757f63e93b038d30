//! What the object stores have in common: a source names an object, or a folder of objects by their prefix.

use super::{Listing, RemoteFile};
use crate::error::StoreError;
use crate::select::MAX_FILES;

/// One object of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredObject {
    pub(super) key: String,
    pub(super) bytes: u64,
    /// As answers carry it.
    pub(super) etag: Option<String>,
    /// What differs when the bytes differ.
    pub(super) version: Option<String>,
}

/// The files that a source names among the objects whose key begins with `key`: the object itself, or what
/// lies below it.
pub(super) fn listing(key: &str, objects: Vec<StoredObject>) -> Listing {
    let file = |object: StoredObject, name: String| RemoteFile {
        name,
        bytes: object.bytes,
        check: None,
        version: object.version,
        etag: object.etag,
        address: object.key,
    };
    let mut files = Vec::new();
    for object in objects {
        if object.key == key && !key.is_empty() {
            let name = key.rsplit('/').next().unwrap_or(key).to_owned();
            return Listing { files: vec![file(object, name)], is_one_file: true, ..Listing::default() };
        }
        let below = match key {
            "" => Some(object.key.as_str()),
            key => object.key.strip_prefix(key).and_then(|rest| rest.strip_prefix('/')),
        };
        // A key that ends in a slash stands for a folder.
        let Some(name) = below.filter(|name| !name.is_empty() && !name.ends_with('/')) else { continue };
        // A name that leaves the folder can only be meant to.
        if name.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            continue;
        }
        let name = name.to_owned();
        files.push(file(object, name));
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Listing { files, ..Listing::default() }
}

/// The same of a complete list, which names at least one file.
pub(super) fn listed(
    key: &str,
    objects: Vec<StoredObject>,
    missing: StoreError,
) -> Result<Listing, StoreError> {
    let listing = listing(key, objects);
    if listing.files.is_empty() { Err(missing) } else { Ok(listing) }
}

/// Ends a list that has more entries than any model.
pub(super) fn check_count(count: usize, shown: &str) -> Result<(), StoreError> {
    if count > MAX_FILES {
        return Err(StoreError::TooManyFiles { folder: shown.into(), limit: MAX_FILES });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_an_object_or_what_lies_below_it() {
        let names = |key: &str, keys: &[&str]| {
            let objects = keys.iter().map(|key| StoredObject {
                key: (*key).to_owned(),
                bytes: 1,
                etag: None,
                version: None,
            });
            let files = listing(key, objects.collect()).files;
            files.into_iter().map(|file| file.name).collect::<Vec<_>>()
        };
        let keys = ["m", "m-other", "m/", "m/a.json", "m/sub/b", "m/../c", "m//d"];
        assert_eq!(names("m/sub/b", &keys), ["b"]);
        assert_eq!(names("m", &keys), ["m"]);
        assert_eq!(names("m", &keys[1..]), ["a.json", "sub/b"]);
        assert_eq!(names("", &["x", "y/z"]), ["x", "y/z"]);
    }
}
