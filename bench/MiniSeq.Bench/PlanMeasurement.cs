using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using TorchSharp;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>A step whose peak is measured and predicted.</summary>
/// <param name="Variant">Which of the three forms.</param>
/// <param name="Model">What the model is like.</param>
/// <param name="Config">The model.</param>
/// <param name="Rows">Tokens of the one document.</param>
/// <param name="DType">Type of the weights and of the computation.</param>
/// <param name="Compute">Options of mini-sequence.</param>
/// <param name="Labelled">Share of the tokens, at the end, that have a label.</param>
/// <param name="Rank">Of the LoRA adapter that is trained; 0 trains all weights.</param>
internal sealed record PlanCase(Variant Variant, string Model, DecoderConfig Config, int Rows, ScalarType DType, ComputeOptions Compute, double Labelled = 1, int Rank = 0)
{
    private static readonly DecoderConfig s_small = DecoderConfig.Llama(4096, 256, 704, 4, 4, 2);
    private static readonly DecoderConfig s_wide = DecoderConfig.Llama(8192, 512, 1408, 2, 8, 8);
    private static readonly DecoderConfig s_deep = DecoderConfig.Llama(2048, 128, 352, 12, 4, 2);
    private static readonly DecoderConfig s_window = s_small with { SlidingWindow = 512 };
    private static readonly DecoderConfig s_norms = s_small with { QkNorm = true, HeadDim = 128 };
    private static readonly DecoderConfig s_gemma = s_window with
    {
        LayerTypes = [LayerType.SlidingAttention, LayerType.FullAttention, LayerType.SlidingAttention, LayerType.FullAttention],
        AttnLogitSoftcapping = 50,
        FinalLogitSoftcapping = 30,
        PostNorms = true,
        RmsNormUnitOffset = true,
        ScaleEmbeddings = true,
        TieWordEmbeddings = true,
        HiddenAct = Activation.GeluTanh,
    };

    /// <summary>The configurations of the command.</summary>
    public static IReadOnlyList<PlanCase> All { get; } =
    [
        Ours("Llama 3-like", s_small, 2048, ScalarType.Float32, 256, RecomputePolicy.Full),
        Ours("Llama 3-like", s_small, 4096, ScalarType.Float32, Chunking.Auto, RecomputePolicy.Full),
        Ours("Llama 3-like", s_small, 4096, ScalarType.BFloat16, 256, RecomputePolicy.Full),
        Ours("Llama 3-like", s_small, 4096, ScalarType.Float32, 256, RecomputePolicy.Full) with { Labelled = 0.05 },
        Ours("Llama 3-like", s_small, 4096, ScalarType.BFloat16, 128, RecomputePolicy.KeepAttention) with { Labelled = 0.05 },
        Ours("Llama 3-like", s_small, 2048, ScalarType.Float32, 64, RecomputePolicy.KeepAttention),
        Ours("Llama 3-like", s_small, 2048, ScalarType.Float32, 256, RecomputePolicy.None),
        Ours("Llama 3-like", s_small, 2048, ScalarType.BFloat16, 256, RecomputePolicy.None),
        Ours("Llama 3-like", s_small, 4096, ScalarType.Float32, 256, RecomputePolicy.Auto, 100 << 20),
        Ours("Llama 3-like", s_small, 4096, ScalarType.BFloat16, 256, RecomputePolicy.Full) with { Rank = 16 },
        Ours("Llama 2-like, wider", s_wide, 2048, ScalarType.Float32, 512, RecomputePolicy.Full),
        Ours("Llama 2-like, wider", s_wide, 2048, ScalarType.Float32, 512, RecomputePolicy.KeepAttention) with { Rank = 64 },
        Ours("deeper", s_deep, 4096, ScalarType.BFloat16, Chunking.Auto, RecomputePolicy.Full),
        Ours("deeper", s_deep, 8192, ScalarType.BFloat16, 256, RecomputePolicy.Full) with { Labelled = 0.05 },
        Ours("sliding window", s_window, 4096, ScalarType.Float32, 256, RecomputePolicy.Full),
        Ours("sliding window", s_window, 4096, ScalarType.BFloat16, 256, RecomputePolicy.KeepAttention),
        Ours("q/k norms", s_norms, 4096, ScalarType.BFloat16, 256, RecomputePolicy.Full),
        Ours("Gemma 2-like", s_gemma, 2048, ScalarType.Float32, 256, RecomputePolicy.Full),
        Ours("Gemma 2-like", s_gemma, 2048, ScalarType.BFloat16, 256, RecomputePolicy.KeepAttention),
        .. new[] { Variant.Plain, Variant.Recompute }.SelectMany(v => new[]
        {
            Theirs(v, "Llama 3-like", s_small, 2048, ScalarType.Float32),
            Theirs(v, "Llama 3-like", s_small, 2048, ScalarType.BFloat16),
            Theirs(v, "Llama 3-like", s_small, 2048, ScalarType.BFloat16) with { Rank = 16 },
            Theirs(v, "deeper", s_deep, 2048, ScalarType.Float32),
            Theirs(v, "q/k norms", s_norms, 2048, ScalarType.BFloat16),
            Theirs(v, "Gemma 2-like", s_gemma, 1024, ScalarType.Float32),
            Theirs(v, "Gemma 2-like", s_gemma, 1024, ScalarType.BFloat16),
        }),
    ];

    private static PlanCase Ours(string model, DecoderConfig config, int rows, ScalarType dtype, int chunk, RecomputePolicy keeps, long? budget = null) =>
        new(Variant.MiniSequence, model, config, rows, dtype, new ComputeOptions(chunk, keeps, budget));

    private static PlanCase Theirs(Variant variant, string model, DecoderConfig config, int rows, ScalarType dtype) => new(variant, model, config, rows, dtype, new ComputeOptions());
}

/// <summary>Bytes that were measured and predicted.</summary>
internal sealed record PlanFigures(long MeasuredBytes, long PredictedBytes)
{
    public double Ratio => (double)PredictedBytes / MeasuredBytes;
}

/// <summary>What became of a case.</summary>
/// <param name="Case">The case.</param>
/// <param name="Activations">Peak beyond weights, gradients and optimizer state, where these exist before.</param>
/// <param name="Whole">Peak of everything, where backward makes the gradients.</param>
internal sealed record PlanMeasurement(PlanCase Case, PlanFigures Activations, PlanFigures Whole)
{
    /// <summary>The largest error that passes.</summary>
    public const double Tolerance = 0.1;

    /// <summary>The larger of the two relative errors.</summary>
    public double Error => Math.Max(Math.Abs(Activations.Ratio - 1), Math.Abs(Whole.Ratio - 1));

    public static PlanMeasurement Of(PlanCase c)
    {
        long empty = Live();
        using var model = new CausalLM(c.Config, c.DType);
        if (c.Rank > 0) model.AddAdapter(new LoraConfig { R = c.Rank });
        using var optimizer = new FusedAdamW(model.parameters(), new TrainingOptions());
        Step(c, model, c.Rows / 100); // code and threads
        MakeGradients(model);         // float32: autograd's own of 16-bit weights, in the plain forms, are of no use to the optimizer
        optimizer.Step(0);            // makes its state
        optimizer.ZeroGrad();
        long whole = Peak(() => Step(c, model, c.Rows)) - empty;

        MakeGradients(model);
        long before = Live() - ((long)c.Rows * c.Config.HeadDim * c.DType.ElementSize()); // but for the rotary tables, which are made already and grow with the sequence
        long activations = Peak(() => Step(c, model, c.Rows)) - before;
        return new PlanMeasurement(c, new PlanFigures(activations, Planned(c, model, GradientLifetime.Accumulated).Activations), new PlanFigures(whole, Planned(c, model, GradientLifetime.Step).Whole));
    }

    private static (long Activations, long Whole) Planned(PlanCase c, CausalLM model, GradientLifetime gradients)
    {
        var batch = BatchShape.Document(c.Rows, Targets(c, c.Rows));
        var training = new TrainingMemory { Adapter = model.Adapter, GradientLifetime = gradients };
        if (c.Variant == Variant.MiniSequence)
        {
            var ours = new MemoryPlan(c.Config, batch, c.DType, c.Compute, training);
            return (ours.PeakBytes, ours.TotalBytes);
        }
        var theirs = new PlainMemoryPlan(c.Config, batch, c.DType, c.Variant == Variant.Recompute, training);
        return (theirs.PeakBytes, theirs.TotalBytes);
    }

    private static int Targets(PlanCase c, int rows) => Math.Clamp((int)(rows * c.Labelled), 1, rows - 1);

    private static void Step(PlanCase c, CausalLM model, int rows)
    {
        using var scope = NewDisposeScope();
        long[] ids = [.. Enumerable.Range(0, rows).Select(i => (long)(i * 7 % c.Config.VocabSize))];
        long[] labels = [.. ids.Select((id, i) => i < rows - Targets(c, rows) ? LinearCrossEntropy.IgnoreIndex : id)];
        if (c.Variant == Variant.MiniSequence)
        {
            using var batch = new TokenBatch([new TokenSequence(ids, labels)]);
            model.ForwardBackward(batch, 1, c.Compute).Dispose();
            return;
        }
        PlainDecoder.LossSum(model, tensor(ids).unsqueeze(0), tensor(labels).unsqueeze(0), c.Variant == Variant.Recompute).backward();
    }

    private static void MakeGradients(CausalLM model)
    {
        foreach (var p in model.parameters().Where(p => p.requires_grad))
        {
            using var gradient = zeros(p.shape, Gradients.AccumulationType(p.dtype));
            p.grad = gradient;
        }
    }

    // What is left to the garbage collector must not be freed in the middle of a measurement.
    private static long Live()
    {
        GC.Collect();
        GC.WaitForPendingFinalizers();
        return TensorMemory.LiveBytes;
    }

    private static long Peak(Action step)
    {
        Live();
        TensorMemory.ResetPeak();
        step();
        return TensorMemory.PeakBytes;
    }
}
