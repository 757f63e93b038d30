//! Tensors in each of the forms in which their values travel.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn tensor(datatype: Datatype, shape: &[u64], data: TensorData) -> InputTensor {
    InputTensor { name: "t".into(), datatype, shape: shape.to_vec(), data }
}

fn raw(bytes: &[u8]) -> TensorData {
    TensorData::Raw(Bytes::copy_from_slice(bytes))
}

fn listed(value: Value) -> TensorData {
    let Value::Array(list) = value else { panic!("{value}") };
    TensorData::Json(list)
}

/// What an output becomes when it is read as an input.
fn widened(data: &OutputData) -> TensorValues {
    match data.clone() {
        OutputData::Flags(all) => TensorValues::Flags(all),
        OutputData::Counts(all) => TensorValues::Unsigned(all.into_iter().map(u64::from).collect()),
        OutputData::Floats(all) => TensorValues::Floats(all.into_iter().map(f64::from).collect()),
        OutputData::Texts(all) => TensorValues::Texts(all),
    }
}

fn outputs() -> impl Strategy<Value = OutputData> {
    prop_oneof![
        prop::collection::vec(any::<bool>(), 0..9).prop_map(OutputData::Flags),
        prop::collection::vec(any::<u32>(), 0..9).prop_map(OutputData::Counts),
        prop::collection::vec(-1e6f32..1e6, 0..9).prop_map(OutputData::Floats),
        prop::collection::vec(any::<String>(), 0..9).prop_map(OutputData::Texts),
    ]
}

proptest! {
    #[test]
    fn what_is_written_in_any_form_is_read_again(data in outputs()) {
        let (datatype, count) = (data.datatype(), data.len());
        let shape = [count as u64];
        let expected = widened(&data);
        let json = listed(serde_json::from_str(&serde_json::to_string(&data).unwrap()).unwrap());
        // A float in JSON is the shortest decimal of an f32, which is read as an f64.
        let as_f32 = |values: TensorValues| match values {
            TensorValues::Floats(all) => TensorValues::Floats(all.iter().map(|one| {
                let text = Value::from(*one);
                f64::from(crate::json_body::float(&text).unwrap())
            }).collect()),
            other => other,
        };
        prop_assert_eq!(as_f32(tensor(datatype, &shape, json).values(count).unwrap()), expected.clone());
        let bytes = raw(&data.to_raw());
        prop_assert_eq!(tensor(datatype, &shape, bytes).values(count).unwrap(), expected.clone());
        let typed = TensorData::Typed(Box::new(data.into_typed()));
        prop_assert_eq!(tensor(datatype, &shape, typed).values(count).unwrap(), expected);
    }

    #[test]
    fn no_bytes_and_no_shape_make_the_reader_panic(
        datatype in prop::sample::select(Datatype::ALL),
        shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..5),
        bytes in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let values = tensor(datatype, &shape, raw(&bytes)).values(16);
        if let Ok(values) = values {
            // Without any element the other lengths may be larger than can be multiplied.
            let count = if shape.contains(&0) { 0 } else { shape.iter().product::<u64>() };
            prop_assert_eq!(values.len() as u64, count);
        }
    }
}

#[test]
fn numbers_of_every_width_are_read_from_bytes() {
    let cases: [(Datatype, &[u8], TensorValues); 13] = [
        (Datatype::Bool, &[1, 0], TensorValues::Flags(vec![true, false])),
        (Datatype::Uint8, &[255, 1], TensorValues::Unsigned(vec![255, 1])),
        (Datatype::Uint16, &[1, 2, 0, 255], TensorValues::Unsigned(vec![0x0201, 0xff00])),
        (Datatype::Uint32, &[1, 0, 0, 0, 0, 0, 0, 128], TensorValues::Unsigned(vec![1, 1 << 31])),
        (
            Datatype::Uint64,
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 128],
            TensorValues::Unsigned(vec![1, 1 << 63]),
        ),
        (Datatype::Int8, &[255, 1], TensorValues::Signed(vec![-1, 1])),
        (Datatype::Int16, &[255, 255, 1, 0], TensorValues::Signed(vec![-1, 1])),
        (Datatype::Int32, &[255, 255, 255, 255, 1, 0, 0, 0], TensorValues::Signed(vec![-1, 1])),
        (
            Datatype::Int64,
            &[255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0, 0, 0, 0, 0],
            TensorValues::Signed(vec![-1, 1]),
        ),
        (Datatype::Fp16, &[0x00, 0x3e, 0x00, 0xc0], TensorValues::Floats(vec![1.5, -2.0])),
        (Datatype::Bf16, &[0xc0, 0x3f, 0x00, 0xc0], TensorValues::Floats(vec![1.5, -2.0])),
        (Datatype::Fp32, &[0, 0, 192, 63, 0, 0, 0, 192], TensorValues::Floats(vec![1.5, -2.0])),
        (
            Datatype::Fp64,
            &[0, 0, 0, 0, 0, 0, 248, 63, 0, 0, 0, 0, 0, 0, 0, 192],
            TensorValues::Floats(vec![1.5, -2.0]),
        ),
    ];
    for (datatype, bytes, expected) in cases {
        assert_eq!(tensor(datatype, &[2], raw(bytes)).values(2), Ok(expected), "{datatype}");
    }
}

#[test]
fn values_in_json_may_be_nested_and_shapes_may_be_empty() {
    let flat = TensorValues::Signed(vec![1, -2, 3, 4]);
    for data in [json!([1, -2, 3, 4]), json!([[1, -2], [3, 4]]), json!([[[1], [-2]], [[3], [4]]])] {
        assert_eq!(tensor(Datatype::Int8, &[2, 2], listed(data)).values(4), Ok(flat.clone()));
    }
    let one = tensor(Datatype::Bytes, &[], listed(json!(["a"])));
    assert_eq!(one.values(1), Ok(TensorValues::Texts(vec!["a".into()])));
    for shape in [&[0, 7][..], &[0, u64::MAX], &[u64::MAX, 0, u64::MAX], &[0]] {
        for data in [raw(b""), listed(json!([])), TensorData::Typed(Box::default())] {
            let found = tensor(Datatype::Fp32, shape, data).values(1);
            assert_eq!(found, Ok(TensorValues::Floats(vec![])), "{shape:?}");
        }
        let error = tensor(Datatype::Fp32, shape, listed(json!([1.0]))).values(1).unwrap_err();
        assert!(error.to_string().contains("has 0"), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_name_of_the_tensor() {
    let typed = |contents: InferTensorContents| TensorData::Typed(Box::new(contents));
    let ints = |all: &[i32]| typed(InferTensorContents { int_contents: all.to_vec(), ..Default::default() });
    let cases = [
        (Datatype::Int32, vec![5], raw(&[0; 20]), "shape [5] has 5 elements; at most 4 are accepted"),
        (Datatype::Int32, vec![u64::MAX, 2], raw(&[]), "more elements than can be counted"),
        (Datatype::Int32, vec![2], raw(&[0; 7]), "has 7 bytes, but shape [2] of INT32 has 2 times 4"),
        (Datatype::Bool, vec![2], raw(&[1, 2]), "byte 1 of its binary data is 2, not 0 or 1"),
        (Datatype::Bytes, vec![1], raw(&[9, 0, 0, 0, b'a']), "element 0 of its binary data is 9 bytes long"),
        (Datatype::Bytes, vec![1], raw(&[1, 0, 0]), "ends with 3 bytes"),
        (Datatype::Bytes, vec![1], raw(&[0; 8]), "holds more than 1 values, but shape [1] has 1"),
        (Datatype::Bytes, vec![2], raw(&[0; 4]), "holds 1 values, but shape [2] has 2"),
        (Datatype::Bytes, vec![1], raw(&[1, 0, 0, 0, 0xff]), "element 0 is not UTF-8"),
        (Datatype::Int32, vec![1], listed(json!([1, 2])), "holds more than 1 values"),
        (Datatype::Int32, vec![3], listed(json!([[1], 2])), "holds 2 values, but shape [3] has 3"),
        (Datatype::Int8, vec![1], listed(json!([128])), "value 0 of its data is no INT8: found 128"),
        (Datatype::Uint16, vec![1], listed(json!([-1])), "value 0 of its data is no UINT16: found -1"),
        (Datatype::Bool, vec![1], listed(json!(["true"])), "is no BOOL: found \"true\""),
        (Datatype::Fp16, vec![1], listed(json!([1.5])), "FP16 has no form in JSON"),
        (Datatype::Bf16, vec![1], typed(InferTensorContents::default()), "send raw_input_contents"),
        (Datatype::Int64, vec![1], ints(&[1]), "its int64_contents hold 0 values, but shape [1] of INT64"),
        (Datatype::Int8, vec![1], ints(&[-129]), "-129 is no INT8"),
    ];
    for (datatype, shape, data, text) in cases {
        let error = tensor(datatype, &shape, data).values(4).unwrap_err().to_string();
        assert!(error.starts_with("t: ") && error.contains(text), "{datatype} {shape:?}: {error}");
    }
}

#[test]
fn a_value_becomes_json_unless_it_is_not_finite() {
    assert_eq!(TensorValues::Floats(vec![0.5, f64::NAN]).json(0), Some(json!(0.5)));
    assert_eq!(TensorValues::Floats(vec![0.5, f64::NAN]).json(1), None);
    assert_eq!(TensorValues::Unsigned(vec![u64::MAX]).json(0), Some(json!(u64::MAX)));
    assert_eq!(TensorValues::Texts(vec![]).json(0), None);
}
