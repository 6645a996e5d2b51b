using System.Text.Json.Serialization;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The three ways to run one training step that are compared.</summary>
internal enum Variant
{
    /// <summary>One autograd graph, everything kept.</summary>
    Plain,

    /// <summary>Each layer recomputed as a whole.</summary>
    Recompute,

    /// <summary>This library.</summary>
    MiniSequence,
}

/// <summary>The model and batch of a run.</summary>
internal sealed record Shape
{
    public int Hidden { get; init; }
    public int Intermediate { get; init; }
    public int Layers { get; init; }
    public int Heads { get; init; }
    public int KvHeads { get; init; }
    public int Vocab { get; init; }
    public int Seq { get; init; }
    public int Batch { get; init; } = 1;

    /// <summary>Share of the positions, at the end, that have a label.</summary>
    public double LossFraction { get; init; } = 1;

    /// <summary>Rank of the adapter that is trained in place of the weights; 0 is none.</summary>
    public int Lora { get; init; }

    [JsonIgnore]
    public DecoderConfig Config => DecoderConfig.Llama(Vocab, Hidden, Intermediate, Layers, Heads, KvHeads);

    /// <summary>Random tokens and labels, the same for every variant.</summary>
    public IReadOnlyList<TokenSequence> Documents(int seq)
    {
        var random = new Random(1);
        int firstLabel = Math.Clamp((int)Math.Round(seq * (1 - LossFraction)), 0, seq - 2);
        return [.. Enumerable.Range(0, Batch).Select(_ =>
        {
            long[] ids = [.. Enumerable.Range(0, seq).Select(_ => random.NextInt64(Vocab))];
            long[] labels = [.. ids.Select((id, i) => i < firstLabel ? -100L : id)];
            return new TokenSequence(ids, labels);
        })];
    }

    public static ScalarType ParseDType(string name) => name.ToLowerInvariant() switch
    {
        "float32" or "f32" or "fp32" => ScalarType.Float32,
        "bfloat16" or "bf16" => ScalarType.BFloat16,
        _ => throw new ArgumentException($"--dtype {name} is not known: write float32 or bfloat16."),
    };

    public static string Name(ScalarType dtype) => dtype.ToString().ToLowerInvariant();

    public static string Name(Variant variant) => variant switch
    {
        Variant.Plain => "plain",
        Variant.Recompute => "recompute",
        _ => "mini-sequence",
    };
}
