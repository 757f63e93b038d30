//! Modules of quantised checkpoints with the values that `e2e/reference/quantised.py` made, and damaged ones.

use super::*;
use proptest::prelude::*;
use serde_json::{Map, Value};

fn reference() -> Map<String, Value> {
    serde_json::from_str(include_str!("reference.json")).unwrap()
}

fn bytes(hex: &Value) -> Vec<u8> {
    let digits = hex.as_str().unwrap();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// The tensors of a case as a file.
fn file(tensors: &Map<String, Value>) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, tensor) in tensors {
        let from = data.len();
        data.extend(bytes(&tensor["data"]));
        let mut about = tensor.clone();
        about.as_object_mut().unwrap().remove("data");
        about["data_offsets"] = serde_json::json!([from, data.len()]);
        header.insert(name.clone(), about);
    }
    let header = Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

fn shard(name: &str, tensors: &Map<String, Value>) -> Shard {
    let stored = StoredTensors::parse(Arc::new(file(tensors))).map_err(|problem| problem.to_string());
    Shard { name: name.to_owned(), stored: stored.unwrap() }
}

fn quantisation(case: &Value) -> Quantisation {
    let mut config = Map::from_iter([("quantization_config".to_owned(), without_nulls(&case["config"]))]);
    Quantisation::take(&mut config).unwrap().unwrap()
}

/// The object as the reader of JSON files gives it.
fn without_nulls(config: &Value) -> Value {
    super::super::json::parse(config.to_string().as_bytes()).unwrap()
}

fn check(name: &str, case: &Value, shards: &mut Vec<Shard>) {
    let problem = unpack(&quantisation(case), shards).map_err(|problem| problem.problem.to_string());
    assert_eq!(problem, Ok(()), "{name}");
    let Some(Shard { stored, .. }) = shards.last() else { panic!("{name}: no tensor") };
    let tensor = &stored.tensors["model.layers.0.mlp.up_proj.weight"];
    assert_eq!(tensor.stored_as, case["becomes"], "{name}");
    let shape = serde_json::json!([tensor.matrix.0, tensor.matrix.1]);
    assert_eq!(shape, case["shape"], "{name}");
    let mut values = vec![0.0; tensor.matrix.0 * tensor.matrix.1];
    tensor.dtype.unwrap().dequantise((*stored.source).as_ref(), &mut values);
    let expected = bytes(&case["values"]);
    for (at, (value, expected)) in values.iter().zip(expected.chunks_exact(4)).enumerate() {
        let expected = f32::from_le_bytes(expected.try_into().unwrap());
        // A zero may have either sign.
        let same = value.to_bits() == expected.to_bits() || *value == 0.0 && expected == 0.0;
        assert!(same, "{name} {at}: {value} for {expected}");
    }
    let rest: usize = shards[..shards.len() - 1].iter().map(|shard| shard.stored.tensors.len()).sum();
    assert_eq!(rest, 0, "{name}: tensors were left in their files");
}

#[test]
fn quantised_modules_have_the_values_of_the_reference_bit_for_bit() {
    for (name, case) in reference() {
        let tensors = case["tensors"].as_object().unwrap();
        check(&name, &case, &mut vec![shard("model.safetensors", tensors)]);
        // The tensors of one module may lie in two files.
        let (first, second): (Map<_, _>, Map<_, _>) = tensors
            .clone()
            .into_iter()
            .partition(|(name, _)| name.ends_with("weight") || name.ends_with("qzeros"));
        check(&name, &case, &mut vec![shard("a.safetensors", &first), shard("b.safetensors", &second)]);
    }
}

#[test]
fn a_module_without_one_of_its_tensors_is_refused() {
    for (name, case) in reference() {
        let tensors = case["tensors"].as_object().unwrap();
        let needed = |name: &&String| {
            !["input_scale", "g_idx", "zero_point"].iter().any(|optional| name.ends_with(optional))
                && !["up_proj.weight", "qweight", "weight_packed"].iter().any(|packed| name.ends_with(packed))
        };
        for lacking in tensors.keys().filter(needed) {
            let mut others = tensors.clone();
            others.remove(lacking);
            let refused = unpack(&quantisation(&case), &mut vec![shard("model.safetensors", &others)]);
            let refused = refused.unwrap_err().problem.to_string();
            assert!(refused.contains("is missing beside it"), "{name} without {lacking}: {refused}");
        }
    }
}

#[test]
fn tensors_that_do_not_fit_each_other_are_refused_by_name() {
    let reference = reference();
    let refused = |case: &str, tensor: &str, change: &dyn Fn(&mut Value)| {
        let case = &reference[case];
        let mut tensors = case["tensors"].as_object().unwrap().clone();
        change(
            tensors
                .entry(format!("model.layers.0.mlp.up_proj.{tensor}"))
                .or_insert_with(|| serde_json::json!({"dtype": "I8", "shape": [1], "data": "00"})),
        );
        let refused = unpack(&quantisation(case), &mut vec![shard("model.safetensors", &tensors)]);
        refused.unwrap_err().problem.to_string()
    };
    let shape = |shape: Value| move |tensor: &mut Value| tensor["shape"] = shape.clone();
    let kind = |kind: &'static str| move |tensor: &mut Value| tensor["dtype"] = kind.into();
    let first = |hex: &'static str| {
        move |tensor: &mut Value| {
            let data = tensor["data"].as_str().unwrap();
            tensor["data"] = format!("{hex}{}", &data[hex.len()..]).into();
        }
    };
    let cases = [
        (
            refused("gptq_zeros", "scales", &shape(serde_json::json!([4, 12]))),
            "scales: it is 4 x 12, and 2 x 24 fits",
        ),
        (refused("gptq_zeros", "qweight", &kind("F32")), "qweight: it is stored as F32; I32 was expected"),
        (refused("gptq_zeros", "scales", &first("007c")), "scales: it has the scale inf"),
        (refused("gptq_order", "g_idx", &first("09000000")), "g_idx: it names the group 9 of 2"),
        (refused("awq", "g_idx", &|_| {}), "g_idx: it is not part of awq"),
        (
            refused("packed_4", "weight_shape", &first("1900000000000000")),
            "which are 25 x 64 weights of neither",
        ),
        (
            refused("packed_4", "weight_shape", &first("ffffffffffffffff")),
            "does not hold the rows and columns",
        ),
        (
            refused("fp8_blocks", "weight_scale_inv", &shape(serde_json::json!([4]))),
            "it is 1 x 4, and 2 x 2 fits",
        ),
        (refused("fp8_blocks", "weight", &first("7f")), "it has a weight that is not a number"),
        (refused("fp8_blocks", "weight", &kind("F8_E5M2")), "it is stored as F8_E5M2; F8_E4M3 was expected"),
        (
            refused("int8_rows", "weight_scale", &shape(serde_json::json!([2, 12]))),
            "scale: it is 2 x 12 for weights",
        ),
    ];
    for (refused, expected) in cases {
        assert!(refused.contains(expected), "{refused}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn damaged_modules_never_panic(
        which in any::<prop::sample::Index>(),
        shapes in prop::collection::vec((any::<prop::sample::Index>(), 0_usize..70, 0_usize..70), 1..3),
        byte in any::<u8>(),
    ) {
        let reference = reference();
        let names: Vec<&String> = reference.keys().collect();
        let case = &reference[*which.get(&names)];
        let mut tensors = case["tensors"].as_object().unwrap().clone();
        for (index, rows, cols) in shapes {
            let keys: Vec<String> = tensors.keys().cloned().collect();
            let tensor = &mut tensors[index.get(&keys)];
            let size = match tensor["dtype"].as_str().unwrap() {
                "I64" => 8,
                "I32" | "F32" => 4,
                "F16" | "BF16" => 2,
                _ => 1,
            };
            tensor["shape"] = serde_json::json!([rows, cols]);
            tensor["data"] = format!("{byte:02x}").repeat(rows * cols * size).into();
        }
        let _unpacked_or_refused = unpack(&quantisation(case), &mut vec![shard("model.safetensors", &tensors)]);
    }
}
