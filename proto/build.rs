//! Compiles the .proto files with protox, so that no protoc has to be installed.

/// The package of the Open Inference Protocol, whose messages are decoded within a limit on their fields.
const TENSORS: &str = "inference";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/trustformers/v1/inference.proto",
        "proto/trustformers/control/v1/control.proto",
        "proto/inference/open_inference.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // Server reflection answers from this set.
    std::fs::write(out_dir.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    let (mut tensors, mut own) = (descriptors.clone(), descriptors);
    tensors.file.retain(|file| file.package() == TENSORS);
    own.file.retain(|file| file.package() != TENSORS);
    tonic_prost_build::configure().compile_fds(own)?;
    tonic_prost_build::configure().codec_path("crate::bounded_codec::BoundedCodec").compile_fds(tensors)?;
    Ok(())
}
