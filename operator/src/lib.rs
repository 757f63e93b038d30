//! Control plane: reconciles InferenceModels and publishes routes.
