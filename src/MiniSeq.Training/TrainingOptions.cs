using MiniSeq.Models;
using static MiniSeq.Models.OptionRange;

namespace MiniSeq.Training;

/// <summary>How the learning rate goes after warmup, Hugging Face <c>lr_scheduler_type</c>.</summary>
public enum LrSchedulerType
{
    /// <summary>Down to 0 in a straight line.</summary>
    Linear,

    /// <summary>Down to 0 along half a cosine.</summary>
    Cosine,

    /// <summary>Stays.</summary>
    Constant,
}

/// <summary>The type in which the optimizer keeps its moments.</summary>
public enum OptimizerStateType
{
    /// <summary>8 bytes a parameter; float64 where the parameters are.</summary>
    Float32,

    /// <summary>
    /// 4 bytes a parameter, computed in float32 and rounded stochastically: to nearest, the second moment would stand still, for a step
    /// changes it by 1 − β₂, less than half of a bfloat16's last digit.
    /// </summary>
    BFloat16,
}

/// <summary>Options of a training run, under the names of Hugging Face's <c>TrainingArguments</c>.</summary>
public sealed record TrainingOptions
{
    /// <summary>Passes over the documents; ignored where <see cref="MaxSteps"/> is given.</summary>
    public int NumTrainEpochs { get; init; } = 3;

    /// <summary>Optimizer steps in all, over as many passes as they take.</summary>
    public int? MaxSteps { get; init; }

    /// <summary>Documents in a micro-batch, laid end to end without padding.</summary>
    public int BatchSize { get; init; } = 1;

    /// <summary>Micro-batches in a step. The loss is the mean over all their target tokens, however they are spread.</summary>
    public int GradientAccumulationSteps { get; init; } = 1;

    /// <summary>The largest learning rate, reached after warmup.</summary>
    public double LearningRate { get; init; } = 5e-5;

    /// <summary>Course of the learning rate.</summary>
    public LrSchedulerType LrSchedulerType { get; init; } = LrSchedulerType.Linear;

    /// <summary>Steps over which the learning rate rises from 0.</summary>
    public int WarmupSteps { get; init; }

    /// <summary>The same as a share of all steps, used where <see cref="WarmupSteps"/> is 0.</summary>
    public double WarmupRatio { get; init; }

    /// <summary>Decoupled weight decay of matrices; norms and biases have none.</summary>
    public double WeightDecay { get; init; }

    /// <summary>β₁ of AdamW.</summary>
    public double AdamBeta1 { get; init; } = 0.9;

    /// <summary>β₂ of AdamW.</summary>
    public double AdamBeta2 { get; init; } = 0.999;

    /// <summary>ε of AdamW.</summary>
    public double AdamEpsilon { get; init; } = 1e-8;

    /// <summary>The type of the optimizer's moments. A 16-bit parameter's master copy is float32 with either.</summary>
    public OptimizerStateType OptimizerState { get; init; }

    /// <summary>
    /// Whether each parameter is updated, and its gradient freed, as soon as that gradient is complete: those of one layer exist at a time, and
    /// not those of the whole model. The updates are the same. Needs <see cref="MaxGradNorm"/> 0 and <see cref="GradientAccumulationSteps"/> 1.
    /// </summary>
    public bool OptimizerInBackward { get; init; }

    /// <summary>Gradients are scaled down to this L2 norm over all parameters; 0 does not clip.</summary>
    public double MaxGradNorm { get; init; } = 1;

    /// <summary>Seed of the order of documents and of torch. Two runs with one seed, machine and thread count are bit-identical.</summary>
    public int Seed { get; init; } = 42;

    /// <summary>Whether each pass has an order of its own.</summary>
    public bool Shuffle { get; init; } = true;

    /// <summary>Steps between two progress reports.</summary>
    public int LoggingSteps { get; init; } = 1;

    /// <summary>Steps between two evaluations on the validation documents; null evaluates after each pass, and always at the end.</summary>
    public int? EvalSteps { get; init; }

    /// <summary>Whether the validation documents are evaluated before the first step, too: a report of step 0.</summary>
    public bool EvalOnStart { get; init; }

    /// <summary>Training stops after this many evaluations without a better validation loss; null never stops early.</summary>
    public int? EarlyStoppingPatience { get; init; }

    /// <summary>Whether the weights of the best evaluation are put back at the end: a second copy of the trained weights.</summary>
    public bool LoadBestModelAtEnd { get; init; }

    /// <summary>Chunk size and what is kept for backward.</summary>
    public ComputeOptions Compute { get; init; } = new();

    /// <summary>Throws where an option is outside its range, or contradicts another.</summary>
    /// <exception cref="ArgumentOutOfRangeException">Names the option, its value and its range.</exception>
    /// <exception cref="ArgumentException"><see cref="OptimizerInBackward"/> with an option that needs all gradients at once.</exception>
    /// <exception cref="IOException"><see cref="ComputeOptions.OffloadFolder"/> is not there or may not be written to.</exception>
    public void Validate()
    {
        Check(NumTrainEpochs > 0 || MaxSteps is not null, nameof(NumTrainEpochs), NumTrainEpochs, "positive");
        Check(MaxSteps is null or > 0, nameof(MaxSteps), MaxSteps, "positive, or null");
        Check(BatchSize > 0, nameof(BatchSize), BatchSize, "positive");
        Check(GradientAccumulationSteps > 0, nameof(GradientAccumulationSteps), GradientAccumulationSteps, "positive");
        Check(LearningRate is >= 0 and < double.PositiveInfinity, nameof(LearningRate), LearningRate, "finite and not negative");
        Check(Enum.IsDefined(LrSchedulerType), nameof(LrSchedulerType), LrSchedulerType, "Linear, Cosine or Constant");
        Check(WarmupSteps >= 0, nameof(WarmupSteps), WarmupSteps, "not negative");
        Check(WarmupRatio is >= 0 and <= 1, nameof(WarmupRatio), WarmupRatio, "in [0, 1]");
        Check(WeightDecay is >= 0 and < double.PositiveInfinity, nameof(WeightDecay), WeightDecay, "finite and not negative");
        Check(AdamBeta1 is >= 0 and < 1, nameof(AdamBeta1), AdamBeta1, "in [0, 1)");
        Check(AdamBeta2 is >= 0 and < 1, nameof(AdamBeta2), AdamBeta2, "in [0, 1)");
        Check(AdamEpsilon > 0, nameof(AdamEpsilon), AdamEpsilon, "positive");
        Check(MaxGradNorm >= 0, nameof(MaxGradNorm), MaxGradNorm, "not negative (0 does not clip)");
        Check(Enum.IsDefined(OptimizerState), nameof(OptimizerState), OptimizerState, "Float32 or BFloat16");
        Check(LoggingSteps > 0, nameof(LoggingSteps), LoggingSteps, "positive");
        Check(EvalSteps is null or > 0, nameof(EvalSteps), EvalSteps, "positive, or null");
        Check(EarlyStoppingPatience is null or > 0, nameof(EarlyStoppingPatience), EarlyStoppingPatience, "positive, or null");
        ArgumentNullException.ThrowIfNull(Compute);
        Compute.Validate();
        CheckOptimizerInBackward();
        if (Compute.OffloadFolder is { } folder) OffloadFile.CheckFolder(folder);
    }

    private void CheckOptimizerInBackward()
    {
        if (!OptimizerInBackward) return;
        var against = new List<string>();
        if (MaxGradNorm > 0) against.Add(FormattableString.Invariant($"MaxGradNorm is {MaxGradNorm}, and clipping needs the norm of all gradients before the first update: set MaxGradNorm = 0"));
        if (GradientAccumulationSteps > 1) against.Add($"GradientAccumulationSteps is {GradientAccumulationSteps}, and adding up micro-batches needs all gradients between them: set GradientAccumulationSteps = 1, and BatchSize for more documents a step");
        if (against.Count > 0) throw new ArgumentException($"OptimizerInBackward frees each gradient before the next layer's is made. But {string.Join("; and ", against)}. Or set OptimizerInBackward = false.");
    }

    /// <summary>The learning rate of a step.</summary>
    /// <param name="step">0 for the first.</param>
    /// <param name="totalSteps">Steps of the run.</param>
    public double LearningRateAt(int step, int totalSteps)
    {
        int warmup = WarmupSteps > 0 ? WarmupSteps : (int)Math.Ceiling(WarmupRatio * totalSteps);
        if (step < warmup) return LearningRate * (step + 1) / (warmup + 1);
        double done = (double)(step - warmup) / Math.Max(1, totalSteps - warmup); // in [0, 1): the last step still learns
        return LearningRate * LrSchedulerType switch
        {
            LrSchedulerType.Linear => 1 - done,
            LrSchedulerType.Cosine => 0.5 * (1 + Math.Cos(Math.PI * done)),
            _ => 1,
        };
    }
}
