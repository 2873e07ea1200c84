//! The compiled files of `kernels/` and the entry points in them.

/// A compiled file of `kernels/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum File {
    /// `adamw.cu`.
    Adamw,
    /// `attention_forward.cu`.
    AttentionForward,
    /// `attention_forward_hopper.cu`.
    AttentionForwardHopper,
    /// `attention_decode.cu`.
    AttentionDecode,
    /// `attention_backward.cu`.
    AttentionBackward,
    /// `attention_backward_hopper.cu`.
    AttentionBackwardHopper,
    /// `copy.cu`.
    Copy,
    /// `embedding.cu`.
    Embedding,
    /// `loss.cu`.
    Loss,
    /// `norm.cu`.
    Norm,
    /// `retrieval.cu`.
    Retrieval,
    /// `rope.cu`.
    Rope,
    /// `sampling.cu`.
    Sampling,
    /// `sink_logits.cu`.
    SinkLogits,
    /// `swiglu.cu`.
    Swiglu,
}

impl File {
    /// All files.
    pub const ALL: [File; 15] = [
        File::Adamw,
        File::AttentionForward,
        File::AttentionForwardHopper,
        File::AttentionDecode,
        File::AttentionBackward,
        File::AttentionBackwardHopper,
        File::Copy,
        File::Embedding,
        File::Loss,
        File::Norm,
        File::Retrieval,
        File::Rope,
        File::Sampling,
        File::SinkLogits,
        File::Swiglu,
    ];

    /// The file's name without its ending.
    pub fn stem(self) -> &'static str {
        match self {
            File::Adamw => "adamw",
            File::AttentionForward => "attention_forward",
            File::AttentionForwardHopper => "attention_forward_hopper",
            File::AttentionDecode => "attention_decode",
            File::AttentionBackward => "attention_backward",
            File::AttentionBackwardHopper => "attention_backward_hopper",
            File::Copy => "copy",
            File::Embedding => "embedding",
            File::Loss => "loss",
            File::Norm => "norm",
            File::Retrieval => "retrieval",
            File::Rope => "rope",
            File::Sampling => "sampling",
            File::SinkLogits => "sink_logits",
            File::Swiglu => "swiglu",
        }
    }

    /// Whether the file's kernels take the structs of `params.h`; then it has their layout as a constant.
    pub fn has_layout(self) -> bool {
        self.stem().starts_with("attention")
    }

    /// Whether the file has kernels for sm_90 alone.
    pub fn is_for_hopper(self) -> bool {
        self.stem().ends_with("_hopper")
    }
}

/// An `extern "C"` kernel. Its metadata is the constant `<name>_info` of the same file, if it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The file that it is in.
    pub file: File,
    /// Its name.
    pub name: &'static str,
}
