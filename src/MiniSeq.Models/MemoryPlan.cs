using MiniSeq.Layers;
using TorchSharp;
using static MiniSeq.Models.OptionRange;
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
/// <param name="ChunkSize">Rows of a mini-sequence in the layers and the LM head, or <see cref="Chunking.Auto"/>: those of its rule, and fewer, down to
/// <see cref="Chunking.FullSpeedRows"/>, where the budget is too small for them.</param>
/// <param name="Recompute">What is kept for backward.</param>
/// <param name="MemoryBudgetBytes">Bytes that the step may use beyond weights, gradients and optimizer state; 0 asks for the least. Null, for <see cref="RecomputePolicy.Auto"/>, is a quarter of
/// the memory that is free on the CPU; where another policy is given, on a GPU, whose free memory TorchSharp does not tell, and with a folder to offload to, null is no budget: nothing but inputs is kept unless
/// the policy says so, in mini-sequences of the automatic size.</param>
/// <param name="OffloadFolder">Folder, on a disk with room for L · rows · d numbers, where the layers' inputs wait for backward in a temporary file, so that only
/// one layer's memory grows with the rows. Null keeps them in memory. On a GPU they wait in pinned host memory, and not in the folder.</param>
/// <param name="GradientFilter">ε of Cut Cross-Entropy: tokens of the vocabulary whose softmax is below it in a whole mini-sequence are left out of the LM
/// head's gradients (<see cref="LinearCrossEntropy.Chunk"/>). 2^−12 is the paper's. An approximation; null, the default, is exact.</param>
public sealed record ComputeOptions(int ChunkSize = Chunking.Auto, RecomputePolicy Recompute = RecomputePolicy.Auto, long? MemoryBudgetBytes = null, string? OffloadFolder = null,
    double? GradientFilter = null)
{
    /// <summary>Throws where an option is outside its range. Whether the folder is there is not looked at.</summary>
    /// <exception cref="ArgumentOutOfRangeException">Names the option, its value and its range.</exception>
    public void Validate()
    {
        Check(ChunkSize >= 0, nameof(ChunkSize), ChunkSize, "positive, or 0 for the automatic rule");
        Check(Enum.IsDefined(Recompute), nameof(Recompute), Recompute, "Auto, Full, KeepAttention or None");
        Check(MemoryBudgetBytes is null or >= 0, nameof(MemoryBudgetBytes), MemoryBudgetBytes, "positive, 0 for the least memory, or null");
        Check(OffloadFolder is not "", nameof(OffloadFolder), OffloadFolder, "a folder, or null to keep the layers' inputs in memory");
        Check(GradientFilter is null or (> 0 and < 1), nameof(GradientFilter), GradientFilter, "between 0 and 1, or null for exact gradients");
    }
}

/// <summary>The memory of one training step as a formula of its shape, and what each layer keeps under it.</summary>
/// <remarks>
/// Held against measured peaks by the tests and by <c>dotnet run -c Release --project bench/MiniSeq.Bench -- plan</c>: within 10%. Counts tensors, as
/// <see cref="TensorMemory"/> does: not the process, nor scratch space inside libtorch's matrix products.
/// </remarks>
public sealed class MemoryPlan
{
    private const long MostBudgetBytes = 1L << 50; // no formula overflows below it

    private StepMemory _step; // with the sizes of mini-sequences that were picked
    private readonly TrainingMemory _training;
    private readonly RecomputePolicy[] _layers;

    /// <summary>The plan of a step of full training over one document.</summary>
    /// <param name="config">The model.</param>
    /// <param name="rows">Tokens of the document.</param>
    /// <param name="targets">Labels that count, at its end.</param>
    /// <param name="dtype">Type of the weights and of the computation.</param>
    /// <param name="options">Chunk size, policy and budget.</param>
    /// <param name="device">Where it runs; null is the CPU.</param>
    public MemoryPlan(DecoderConfig config, long rows, long targets, ScalarType dtype, ComputeOptions options, Device? device = null)
        : this(config, BatchShape.Document(rows, targets), dtype, options, device: device)
    {
    }

    /// <summary>The plan of a step.</summary>
    /// <param name="config">The model.</param>
    /// <param name="batch">The documents.</param>
    /// <param name="dtype">Type of the weights and of the computation.</param>
    /// <param name="options">Chunk size, policy and budget.</param>
    /// <param name="training">What is trained and how; null is full training with AdamW in float32.</param>
    /// <param name="device">Where it runs; null is the CPU.</param>
    /// <exception cref="ArgumentOutOfRangeException">No row, more targets than rows, or an option outside its range.</exception>
    public MemoryPlan(DecoderConfig config, BatchShape batch, ScalarType dtype, ComputeOptions options, TrainingMemory? training = null, Device? device = null)
    {
        batch.Validate();
        options.Validate();
        _training = training ?? new TrainingMemory();
        _step = new StepMemory(config, batch, dtype, options, _training.Adapter, device);
        _layers = new RecomputePolicy[config.NumHiddenLayers];
        Array.Fill(_layers, options.Recompute == RecomputePolicy.Auto ? RecomputePolicy.Full : options.Recompute);
        if (Budget(options, device) is not { } budget) return;
        if (options.ChunkSize == Chunking.Auto) Shrink(budget);
        if (options.Recompute == RecomputePolicy.Auto) Fill(budget);
    }

    /// <summary>Rows of a mini-sequence in the layers.</summary>
    public long ChunkRows => _step.ChunkRows;

    /// <summary>Rows of a mini-sequence in the LM head.</summary>
    public long LogitRows => _step.LogitRows;

    /// <summary>What each layer keeps: never <see cref="RecomputePolicy.Auto"/>.</summary>
    public IReadOnlyList<RecomputePolicy> Layers => _layers;

    /// <summary>Predicted peak beyond weights, gradients and optimizer state, in bytes: the batch, what is kept, and what is at work.</summary>
    public long PeakBytes => _step.Stages(_layers).Max(s => s.Bytes);

    /// <summary>Weights, and adapters where there are any, in bytes.</summary>
    public long WeightBytes => _training.WeightBytes(_step.Parameters);

    /// <summary>Moments and master copies of the optimizer, in bytes.</summary>
    public long OptimizerBytes => _training.OptimizerBytes(_step.Parameters);

    /// <summary>Predicted peak of the whole step, in bytes: weights, optimizer state, and the gradients and activations of the stage where they take most together.</summary>
    public long TotalBytes => _training.TotalBytes(_step.Parameters, _step.Stages(_layers), Gradients.AccumulationType(_step.DType).ElementSize());

    /// <summary>The most tokens whose memory stays within a budget; 0 where not even one does.</summary>
    /// <param name="budgetBytes">At most 2^50.</param>
    /// <param name="bytes">Memory of a step over so many tokens, which grows with them: <see cref="TotalBytes"/> or <see cref="PeakBytes"/> of their plan, or of a <see cref="PlainMemoryPlan"/>.</param>
    /// <exception cref="ArgumentOutOfRangeException">A budget outside its range.</exception>
    public static int Longest(long budgetBytes, Func<int, long> bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(budgetBytes);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(budgetBytes, MostBudgetBytes);
        int step = 1;
        while (step <= int.MaxValue / 2 && bytes(step) <= budgetBytes) step *= 2;
        int fits = 0;
        for (; step > 0; step /= 2)
            if (fits + (long)step <= int.MaxValue && bytes(fits + step) <= budgetBytes) fits += step;
        return fits;
    }

    // Half as many rows a mini-sequence, and half of that, until the least that must be held fits; not so few that products get slow.
    private void Shrink(long budget)
    {
        static long Half(long rows) => Math.Min(rows, Math.Max(Chunking.FullSpeedRows, rows / 2));
        while (PeakBytes > budget && Math.Max(_step.ChunkRows, _step.LogitRows) > Chunking.FullSpeedRows)
            _step = _step with { ChunkRows = Half(_step.ChunkRows), LogitRows = Half(_step.LogitRows) };
    }

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

    private static long? Budget(ComputeOptions options, Device? device)
    {
        if (options.MemoryBudgetBytes is { } given) return given;
        bool keeps = options.Recompute == RecomputePolicy.Auto && options.OffloadFolder is null && (device is null || device.type == DeviceType.CPU);
        return keeps ? TensorMemory.AvailableBytes / 4 : null;
    }
}
