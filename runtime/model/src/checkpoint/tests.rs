//! Files of weights that are correct, damaged or missing.

use super::*;
use crate::seeded::SeededEncoder;
use proptest::prelude::*;
use std::sync::Arc;

fn parse(file: Vec<u8>) -> Result<StoredTensors, CheckpointProblem> {
    StoredTensors::parse(Arc::new(file))
}

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn tensors_are_matrices_with_byte_ranges() {
    let header = r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},"c":{"dtype":"I64","shape":[1],"data_offsets":[28,36]},"d":{"dtype":"F16","shape":[],"data_offsets":[36,38]}}"#;
    let stored = parse(file(header, 38)).unwrap();
    let start = 8 + header.len();
    let a = &stored.tensors["a"];
    assert_eq!((a.dtype, a.matrix, a.range.clone()), (Some(DType::F32), (2, 3), start..start + 24));
    let b = &stored.tensors["b"];
    assert_eq!((b.dtype, b.matrix, b.range.clone()), (Some(DType::BF16), (1, 2), start + 24..start + 28));
    assert_eq!((stored.tensors["c"].dtype, stored.tensors["c"].stored_as.as_str()), (None, "I64"));
    assert_eq!(stored.tensors["d"].matrix, (1, 1));
    assert_eq!(stored.file_bytes(), start + 38);
}

#[test]
fn offsets_outside_the_file_are_refused() {
    let tensor = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    assert!(parse(file(&tensor("[4]", 0, 16), 16)).is_ok());
    let cases = [
        file(&tensor("[4]", 0, 16), 15),
        file(&tensor("[4]", 0, 16), 17),
        file(&tensor("[4]", 4, 20), 20),
        file(&tensor("[5]", 0, 16), 16),
        file(&tensor("[4]", 16, 0), 16),
        file(&tensor("[18446744073709551615,2]", 0, 16), 16),
        file(&tensor("[4]", 0, u64::MAX), 16),
        file("{", 0),
        u64::MAX.to_le_bytes().to_vec(),
        vec![0; 7],
        Vec::new(),
    ];
    for case in cases {
        let problem = parse(case).err().unwrap();
        let expected = matches!(problem, CheckpointProblem::Safetensors(_) | CheckpointProblem::Foreign(_));
        assert!(expected, "{problem}");
    }
}

#[test]
fn other_files_of_weights_are_named() {
    let folder = tempfile::tempdir().unwrap();
    SeededEncoder::default().write(folder.path()).unwrap();
    std::fs::rename(folder.path().join(WEIGHTS), folder.path().join("pytorch_model.bin")).unwrap();
    let error = crate::Model::load(folder.path(), &mut |_| {}).unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors: it is missing, and pytorch_model.bin holds the weights"),
        "{error}"
    );
    std::fs::write(folder.path().join("model.safetensors.index.json"), "{}").unwrap();
    let error = crate::Model::load(folder.path(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("split over several files (model.safetensors.index.json)"), "{error}");
    std::fs::write(folder.path().join(CONFIG), "{\"model_type\": 3}").unwrap();
    let error = crate::Model::load(folder.path(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("config.json: it cannot be read as JSON with the expected keys"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_checkpoints_never_panic(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        end in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut files = SeededEncoder { layers: 1, ..SeededEncoder::default() }.files();
        let name = *which.get(&files.keys().copied().collect::<Vec<_>>());
        let file = files.get_mut(name).unwrap();
        // Damage the descriptions, not the numbers of a tensor.
        let descriptions = file.len().min(4000);
        for (at, byte) in changes {
            file[at.index(descriptions)] = byte;
        }
        if cut {
            file.truncate(end.index(file.len()));
        }
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in &files {
            std::fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        if let Ok(model) = crate::Model::load(folder.path(), &mut |_| {}) {
            let _encoded_or_refused = model.encode("the cat, hello");
        }
    }
}
