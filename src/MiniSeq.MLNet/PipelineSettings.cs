using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet;

/// <summary>What a fitted model is apart from weights and tokenizer; saved in the manifest.</summary>
internal sealed record PipelineSettings
{
    public required string InputColumnName { get; init; }

    public required string OutputColumnName { get; init; }

    public required string? LabelColumnName { get; init; }

    public required string PromptTemplate { get; init; }

    public required bool CompletionOnlyLoss { get; init; }

    public required int MaxLength { get; init; }

    public required int InferenceBatchSize { get; init; }

    public required GenerationOptions Generation { get; init; }

    public DocumentEncoder Encoder(HuggingFaceTokenizer tokenizer) => new(tokenizer, PromptTemplate, MaxLength);
}
