//! Models that are split over several GGUF files, as `llama-gguf-split` makes them: the first has all keys,
//! and each has some of the tensors.

use crate::error::LoadError;
use crate::gguf::Gguf;
use crate::source::{self, OnRead, ReadProgress};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use trustformers_plan::WeightBytes;

/// Most parts that are looked for; a name has five digits, and the largest models have some hundreds.
const MAX_PARTS: u32 = 10_000;

/// One file of a model.
pub(crate) struct ModelPart {
    pub(crate) path: PathBuf,
    pub(crate) gguf: Gguf,
    pub(crate) file: WeightBytes,
}

/// Maps and parses the files, which are all parts of one model in their order, or its only one.
pub(crate) fn read(paths: &[&Path], progress: &mut OnRead<'_>) -> Result<Vec<ModelPart>, LoadError> {
    let mut total_bytes = 0;
    for path in paths {
        total_bytes += source::open_file(path)?.1;
    }
    let (mut parts, mut before) = (Vec::new(), 0);
    for path in paths {
        let mut of_file = |read: ReadProgress| -> ControlFlow<()> {
            progress(ReadProgress { bytes: before + read.bytes, total_bytes })
        };
        let file = source::open(path, &mut of_file)?;
        before += (*file).as_ref().len() as u64;
        let gguf = Gguf::parse((*file).as_ref()).map_err(|problem| LoadError::gguf(path, problem))?;
        parts.push(ModelPart { path: path.to_path_buf(), gguf, file });
    }
    check(&parts)?;
    Ok(parts)
}

/// Refuses files that are not all parts of one model in their order.
pub(crate) fn check(parts: &[ModelPart]) -> Result<(), LoadError> {
    for (part, index) in parts.iter().zip(0..) {
        let of_part = part.gguf.check_part(index, parts.len() as u64);
        of_part.map_err(|problem| LoadError::gguf(&part.path, problem))?;
    }
    let Some(first) = parts.first() else { return Ok(()) };
    let found = parts.iter().map(|part| part.gguf.tensors.len() as u64).sum();
    first.gguf.check_tensor_count(found).map_err(|problem| LoadError::gguf(&first.path, problem))
}

/// The files of a model beside one that is called as its first part, `NAME-00001-of-00003.gguf`.
pub(crate) fn beside(path: &Path) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (start, count) = name.rsplit_once("-of-")?;
    let start = start.strip_suffix("-00001")?;
    let is_number = count.len() == 5 && count.bytes().all(|byte| byte.is_ascii_digit());
    let parts: u32 = count.parse().ok().filter(|parts| is_number && (2..=MAX_PARTS).contains(parts))?;
    Some(
        (1..=parts)
            .map(|number| path.with_file_name(format!("{start}-{number:05}-of-{count}.gguf")))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_by_the_name_of_the_first() {
        let found = beside(Path::new("/m/a-b-00001-of-00003.gguf")).unwrap();
        let expected = [1, 2, 3].map(|number| PathBuf::from(format!("/m/a-b-0000{number}-of-00003.gguf")));
        assert_eq!(found, expected);
        for other in ["a.gguf", "a-00002-of-00003.gguf", "a-00001-of-00001.gguf", "a-00001-of-3.gguf"] {
            assert_eq!(beside(Path::new(other)), None, "{other}");
        }
    }
}
