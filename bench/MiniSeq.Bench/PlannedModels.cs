using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>A line of the table of models.</summary>
/// <param name="Model">Its name.</param>
/// <param name="Setting">How it is trained.</param>
/// <param name="ResidentBytes">Weights and optimizer state.</param>
/// <param name="Longest">Tokens, for each budget plain, recompute and mini-sequence; 0 where nothing fits.</param>
internal sealed record PlannedModel(string Model, string Setting, long ResidentBytes, IReadOnlyList<int> Longest);

/// <summary>The models and settings of the table that <c>plan --models</c> prints: predicted from public configurations, for a machine that need not be at hand.</summary>
internal static class PlannedModels
{
    public static IReadOnlyList<int> Gigabytes { get; } = [24, 48, 80];

    /// <summary>What the table assumes, a line each.</summary>
    public static IReadOnlyList<string> Notes { get; } =
    [
        "Weights are bfloat16, the optimizer is AdamW. The settings: as in the paper (arXiv 2407.15892), bfloat16 moments, no float32 master copy, optimizer in backward;",
        "full, the same with this library's float32 master copy, without which it does not train 16-bit weights; LoRA, rank 16 on all seven projections, float32 adapters and moments.",
        "The paper, measured on an 80 GB A100: mini-sequence 60k tokens of Llama 3 8B and 84k of Llama 2 7B.",
        "Mistral 7B is v0.2 or later, without a window. Plain forms of Gemma 2 hold all scores of attention, as Hugging Face's eager form does.",
        "Counted are tensors: a GPU's context, its kernels' scratch space and fragmentation come on top.",
    ];

    private static readonly (string Name, DecoderConfig Config)[] s_models =
    [
        ("Llama 3 8B", DecoderConfig.Llama(128256, 4096, 14336, 32, 32, 8)),
        ("Llama 2 7B", DecoderConfig.Llama(32000, 4096, 11008, 32, 32, 32)),
        ("Mistral 7B", DecoderConfig.Llama(32000, 4096, 14336, 32, 32, 8)),
        ("Qwen2 7B", DecoderConfig.Llama(152064, 3584, 18944, 28, 28, 4) with { QkvBias = true }),
        ("Gemma 2 9B", DecoderConfig.Llama(256000, 3584, 14336, 42, 16, 8, tieWordEmbeddings: true) with
        {
            HeadDim = 256,
            SlidingWindow = 4096,
            LayerTypes = [.. Enumerable.Range(0, 42).Select(l => l % 2 == 0 ? LayerType.SlidingAttention : LayerType.FullAttention)],
            AttnLogitSoftcapping = 50,
            FinalLogitSoftcapping = 30,
            PostNorms = true,
            RmsNormUnitOffset = true,
            ScaleEmbeddings = true,
        }),
    ];

    private static readonly (string Name, TrainingMemory Training)[] s_settings =
    [
        ("paper", new TrainingMemory { Moments = ScalarType.BFloat16, MasterCopy = false, GradientLifetime = GradientLifetime.Module }),
        ("full", new TrainingMemory { Moments = ScalarType.BFloat16, GradientLifetime = GradientLifetime.Module }),
        ("LoRA 16", new TrainingMemory { Adapter = new LoraConfig { R = 16 } }),
    ];

    public static IEnumerable<PlannedModel> All()
    {
        foreach (var (model, config) in s_models)
            foreach (var (setting, training) in s_settings)
            {
                var shortest = Ours(config, training, 1);
                yield return new PlannedModel(model, setting, shortest.WeightBytes + shortest.OptimizerBytes,
                    [.. Gigabytes.SelectMany(gb => Enum.GetValues<Variant>().Select(v => MemoryPlan.Longest((long)gb << 30, rows => Bytes(v, config, training, rows))))]);
            }
    }

    private static long Bytes(Variant variant, DecoderConfig config, TrainingMemory training, int rows) => variant == Variant.MiniSequence
        ? Ours(config, training, rows).TotalBytes
        : new PlainMemoryPlan(config, BatchShape.Document(rows), ScalarType.BFloat16, variant == Variant.Recompute, training).TotalBytes;

    private static MemoryPlan Ours(DecoderConfig config, TrainingMemory training, int rows) =>
        new(config, BatchShape.Document(rows), ScalarType.BFloat16, new ComputeOptions(Recompute: RecomputePolicy.Full), training);
}
