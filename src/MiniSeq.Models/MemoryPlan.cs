using MiniSeq.Layers;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Models;

/// <summary>What the layers keep from forward for backward; what they do not keep they compute again.</summary>
public enum RecomputePolicy
{
    /// <summary>As much as the memory budget allows, layer by layer: first attention, then everything.</summary>
    Auto,

    /// <summary>Each layer keeps its input only.</summary>
    Full,

    /// <summary>Attention's output and log-sum-exp, too: attention, quadratic in the length, runs forward once and not twice.</summary>
    KeepAttention,

    /// <summary>Every product: nothing is computed twice, but for what norms behind a product need (q/k norms, Gemma 2's).</summary>
    None,
}

/// <summary>How a training step trades memory for time.</summary>
/// <param name="ChunkSize">Rows of a mini-sequence in the layers and the LM head, or <see cref="Chunking.Auto"/>.</param>
/// <param name="Recompute">What is kept for backward.</param>
/// <param name="MemoryBudgetBytes">For <see cref="RecomputePolicy.Auto"/>: bytes that the step may use beyond weights, gradients and optimizer
/// state. Null is a quarter of the memory that is free on the CPU, and on a GPU, whose free memory TorchSharp does not tell, the least; so with a folder to offload to.</param>
/// <param name="OffloadFolder">Folder, on a disk with room for L · rows · d numbers, where the layers' inputs wait for backward in a temporary file, so that only
/// one layer's memory grows with the rows. Null keeps them in memory. On a GPU they wait in pinned host memory, and not in the folder.</param>
/// <param name="GradientFilter">ε of Cut Cross-Entropy: tokens of the vocabulary whose softmax is below it in a whole mini-sequence are left out of the LM
/// head's gradients (<see cref="LinearCrossEntropy.Chunk"/>). 2^−12 is the paper's. An approximation; null, the default, is exact.</param>
public sealed record ComputeOptions(int ChunkSize = Chunking.Auto, RecomputePolicy Recompute = RecomputePolicy.Auto, long? MemoryBudgetBytes = null, string? OffloadFolder = null,
    double? GradientFilter = null);

/// <summary>The memory of one training step as a formula of its shape, and what each layer keeps under it.</summary>
public sealed class MemoryPlan
{
    private const long FlashScratchBytes = 2 << 20; // buffers of the flash kernel's threads, measured
    private const int MlpIntermediates = 5;             // gate, up and three of their gradients at once

    private readonly DecoderConfig _config;
    private readonly long _rows;
    private readonly long _element;
    private readonly RecomputePolicy[] _layers;
    private readonly bool _offloads; // no layer's input is kept but that of the layer at work

    /// <summary>The plan of a step.</summary>
    /// <param name="config">The model.</param>
    /// <param name="rows">Tokens of the batch.</param>
    /// <param name="targets">Labels that count.</param>
    /// <param name="dtype">Type of the computation.</param>
    /// <param name="options">Chunk size, policy and budget.</param>
    /// <param name="device">Where it runs; null is the CPU.</param>
    public MemoryPlan(DecoderConfig config, long rows, long targets, ScalarType dtype, ComputeOptions options, Device? device = null)
    {
        (_config, _rows, _element) = (config, rows, dtype.ElementSize());
        ChunkRows = Chunking.Rows(options.ChunkSize, rows, config.IntermediateSize, dtype);
        LogitRows = Chunking.LogitRows(options.ChunkSize, Math.Max(1, targets), config.VocabSize, dtype);
        _offloads = options.OffloadFolder is not null;
        _layers = new RecomputePolicy[config.NumHiddenLayers];
        Array.Fill(_layers, options.Recompute == RecomputePolicy.Auto ? RecomputePolicy.Full : options.Recompute);
        if (options.Recompute == RecomputePolicy.Auto) Fill(options.MemoryBudgetBytes ?? (_offloads ? 0 : DefaultBudget(device)));
    }

    /// <summary>Rows of a mini-sequence in the layers.</summary>
    public long ChunkRows { get; }

    /// <summary>Rows of a mini-sequence in the LM head.</summary>
    public long LogitRows { get; }

    /// <summary>What each layer keeps: never <see cref="RecomputePolicy.Auto"/>.</summary>
    public IReadOnlyList<RecomputePolicy> Layers => _layers;

    /// <summary>Predicted peak beyond weights, gradients and optimizer state, in bytes.</summary>
    public long PeakBytes
    {
        get
        {
            long kept = _layers.Sum(KeptBytes);
            long peak = kept + (2 * Hidden) + HeadChunkBytes; // the last layer's output and its gradient
            for (int l = _layers.Length - 1; l >= 0; l--)
            {
                peak = Math.Max(peak, kept + Hidden + (_offloads ? Hidden : 0) + BackwardBytes(_layers[l]));
                kept -= KeptBytes(_layers[l]);
            }
            return peak;
        }
    }

    private long Hidden => _rows * _config.HiddenSize * _element;

    private long Queries => _rows * _config.NumAttentionHeads * _config.HeadDim * _element;

    private long KeysValues => 2 * _rows * _config.NumKeyValueHeads * _config.HeadDim * _element;

    private long LogSumExp => _rows * _config.NumAttentionHeads * sizeof(float);

    private long HeadChunkBytes => LogitRows * _config.VocabSize * _element;

    private long MlpChunkBytes => MlpIntermediates * ChunkRows * _config.IntermediateSize * _element;

    // Scores of a tile and their gradients, where attention has a window or a cap; the keys' and values' gradients are float32 there.
    private long AttentionScratchBytes => _config.SlidingWindow is null && _config.AttnLogitSoftcapping is null
        ? FlashScratchBytes
        : (4L * _config.NumAttentionHeads * Math.Min(_rows, Attention.TileQueries) * Math.Min(_rows, Attention.TileKeys) * sizeof(float)) + (KeysValues / _element * sizeof(float));

    // Upgrades layers one by one, the last first, while the peak stays within the budget.
    private void Fill(long budget)
    {
        foreach (var policy in new[] { RecomputePolicy.KeepAttention, RecomputePolicy.None })
            for (int l = _layers.Length - 1; l >= 0; l--)
            {
                var before = _layers[l];
                _layers[l] = policy;
                if (PeakBytes <= budget) continue;
                _layers[l] = before;
                return;
            }
    }

    private long KeptBytes(RecomputePolicy policy) => (_offloads ? 0 : Hidden) + policy switch
    {
        RecomputePolicy.Full => 0,
        RecomputePolicy.KeepAttention => Queries + LogSumExp,
        _ => (2 * Queries) + KeysValues + LogSumExp + Hidden + (2 * _rows * _config.IntermediateSize * _element),
    };

    // What a layer's backward makes: recomputed q, k, v and attention, the gradient of attention's output, then those of q, k, v.
    private long BackwardBytes(RecomputePolicy policy)
    {
        long recomputed = policy switch
        {
            RecomputePolicy.Full => (2 * Queries) + KeysValues + LogSumExp,
            RecomputePolicy.KeepAttention => Queries + KeysValues,
            _ => 0,
        };
        return recomputed + Queries + Math.Max(MlpChunkBytes, Queries + KeysValues + AttentionScratchBytes);
    }

    private static long DefaultBudget(Device? device) => device is null || device.type == DeviceType.CPU ? TensorMemory.AvailableBytes / 4 : 0;
}
