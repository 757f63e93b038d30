//! An answer over gRPC: `cargo run --release --example course-08-grpc`

use std::error::Error;

use trustformers_serve::proto::{GenerateRequest, inference_service_client::InferenceServiceClient};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::var("TRUSTFORMERS_GRPC").unwrap_or_else(|_| "http://[::1]:9090".to_owned());
    let model = std::env::var("TRUSTFORMERS_MODEL").unwrap_or_else(|_| "smollm2".to_owned());
    println!("{}", answer(&address, &model).await?);
    Ok(())
}

/// Asks a model of the server at this address.
pub(crate) async fn answer(address: &str, model: &str) -> Result<String, Box<dyn Error>> {
    let mut client = InferenceServiceClient::connect(address.to_owned()).await?;
    let request = GenerateRequest {
        model: model.to_owned(),
        prompt: "The three primary colours are".to_owned(),
        max_tokens: 24,
        // temperature 0, which is the default of this field, is greedy.
        ..Default::default()
    };
    Ok(client.generate(request).await?.into_inner().text)
}
