using System.Text.Json.Serialization;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.MLNet;

/// <summary>What a fitted model is apart from weights and tokenizer; saved in the manifest.</summary>
internal sealed record PipelineSettings
{
    public required string InputColumnName { get; init; }

    public required string OutputColumnName { get; init; }

    public required string? LabelColumnName { get; init; }

    public required string PromptTemplate { get; init; }

    /// <summary>Null in manifests from before there were chat templates, too.</summary>
    [JsonConverter(typeof(JsonStringEnumConverter<ChatTemplateKind>))]
    public ChatTemplateKind? ChatTemplate { get; init; }

    /// <summary>The type in which the model computes; null in manifests from before it could be chosen, which is that of the weights.</summary>
    [JsonConverter(typeof(JsonStringEnumConverter<ScalarType>))]
    public ScalarType? DType { get; init; }

    public required bool CompletionOnlyLoss { get; init; }

    public required int MaxLength { get; init; }

    public required int InferenceBatchSize { get; init; }

    public required GenerationOptions Generation { get; init; }

    public IRowEncoder Encoder(HuggingFaceTokenizer tokenizer) => ChatTemplate is { } kind
        ? new DialogueRows(new DialogueEncoder(new ChatTemplate(tokenizer, kind), MaxLength, PromptTemplate), LabelColumnName is not null, CompletionOnlyLoss)
        : new DocumentRows(new DocumentEncoder(tokenizer, PromptTemplate, MaxLength), CompletionOnlyLoss);

    /// <summary>The token that ends an answer; null without a chat template.</summary>
    public int? EndOfTurnTokenId(HuggingFaceTokenizer tokenizer) =>
        ChatTemplate is { } kind ? new ChatTemplate(tokenizer, kind).EndOfTurnTokenId : null;
}
