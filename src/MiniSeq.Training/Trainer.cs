using System.Diagnostics;
using MiniSeq.Layers;
using MiniSeq.Models;
using TorchSharp.Modules;
using static TorchSharp.torch;

namespace MiniSeq.Training;

/// <summary>What is known after a step.</summary>
/// <param name="Step">Optimizer steps done.</param>
/// <param name="TotalSteps">Steps of the run.</param>
/// <param name="Epoch">Passes over the documents done, as a fraction.</param>
/// <param name="Loss">Mean loss a target token, in nats, over the steps since the last report; 0 in the report of step 0.</param>
/// <param name="LearningRate">Of the last step.</param>
/// <param name="GradNorm">L2 norm of the last step's gradient before clipping.</param>
/// <param name="TokensPerSecond">Tokens read, targets or not, since the last report; evaluation is not counted.</param>
/// <param name="PeakMemoryBytes">Largest memory so far: exact bytes of tensors where <see cref="TensorMemory.StartCounting"/> was called, else resident memory of the process.</param>
/// <param name="Evaluation">Score on the validation documents, where this report follows an evaluation.</param>
public sealed record TrainingProgress(int Step, int TotalSteps, double Epoch, double Loss, double LearningRate, double GradNorm,
    double TokensPerSecond, long PeakMemoryBytes, EvaluationResult? Evaluation);

/// <summary>Score of a model on documents.</summary>
/// <param name="Loss">Mean −log p of a target token, in nats.</param>
/// <param name="Accuracy">Share of target tokens that are the model's likeliest.</param>
/// <param name="TargetCount">Target tokens.</param>
public sealed record EvaluationResult(double Loss, double Accuracy, long TargetCount)
{
    /// <summary>exp(loss).</summary>
    public double Perplexity => Math.Exp(Loss);
}

/// <summary>How a run ended.</summary>
/// <param name="Steps">Optimizer steps done.</param>
/// <param name="TrainLoss">Mean loss a target token over the whole run.</param>
/// <param name="FinalEvaluation">Score at the end, where there are validation documents: of the weights that the model now has.</param>
/// <param name="StoppedEarly">Whether patience ended the run.</param>
public sealed record TrainingResult(int Steps, double TrainLoss, EvaluationResult? FinalEvaluation, bool StoppedEarly);

/// <summary>The training loop: documents → micro-batches → driven forward and backward → clipping → AdamW.</summary>
public static class Trainer
{
    /// <summary>Trains the parameters of a model that require a gradient.</summary>
    /// <param name="model">Changed in place; when an exception ends the run it holds the weights after the last whole step. Only with
    /// <see cref="TrainingOptions.OptimizerInBackward"/>, and never after a cancellation, may a part of them be the next step's already.</param>
    /// <param name="documents">At least one, with at least one target in all.</param>
    /// <param name="validation">Documents to evaluate on, or none.</param>
    /// <param name="options">See there.</param>
    /// <param name="progress">Told every <see cref="TrainingOptions.LoggingSteps"/> steps and after each evaluation.</param>
    /// <param name="cancellationToken">Looked at before each layer.</param>
    /// <exception cref="NotFiniteNumberException">Loss or gradient is NaN or infinite; the message names the step.</exception>
    /// <exception cref="OperationCanceledException">The run was cancelled.</exception>
    /// <exception cref="ArgumentException">No documents, no targets, or an option outside its range.</exception>
    /// <exception cref="IOException"><see cref="ComputeOptions.OffloadFolder"/> cannot be written to, said before the first step, or is full.</exception>
    public static TrainingResult Train(CausalLM model, IReadOnlyList<TokenSequence> documents, IReadOnlyList<TokenSequence>? validation, TrainingOptions options,
        IProgress<TrainingProgress>? progress = null, CancellationToken cancellationToken = default)
    {
        options.Validate();
        if (documents.Sum(d => d.TargetCount) == 0) throw new ArgumentException($"There is nothing to learn: {documents.Count} documents without a single target token.", nameof(documents));
        TensorMemory.KeepFreedMemory();
        random.manual_seed(options.Seed);
        using var optimizer = new FusedAdamW(model.parameters(), options);
        using var best = new BestWeights(model, options);
        int stepsPerEpoch = StepsPerEpoch(documents.Count, options);
        int totalSteps = options.MaxSteps ?? stepsPerEpoch * options.NumTrainEpochs;
        var report = new Report(totalSteps, stepsPerEpoch, progress);
        var order = new Random(options.Seed);
        int step = 0;
        bool training = model.training;
        model.train(); // an adapter's dropout acts
        try
        {
            if (options.EvalOnStart) EvaluateNow();
            foreach (var window in Windows(documents, options, order))
            {
                double rate = options.LearningRateAt(step, totalSteps);
                var done = Step(model, optimizer, window, step, rate, options, cancellationToken);
                report.Add(++step, done, rate);
                bool last = step == totalSteps;
                if (last || step % (options.EvalSteps ?? stepsPerEpoch) == 0) EvaluateNow();
                if (last || step % options.LoggingSteps == 0) report.Send();
                if (last || best.OutOfPatience) break;
            }
            bool restored = best.Restore();
            return new TrainingResult(step, report.TotalLoss, restored ? best.Score : report.LastEvaluation, step < totalSteps);
        }
        finally
        {
            model.train(training);
            optimizer.ZeroGrad();
        }

        void EvaluateNow()
        {
            if (validation is not { Count: > 0 }) return;
            report.Pause();
            var score = Evaluate(model, validation, options.Compute, cancellationToken);
            best.Consider(score);
            report.Evaluated(score);
        }
    }

    /// <summary>Mean loss and accuracy over the targets of all documents, one document at a time.</summary>
    /// <exception cref="ArgumentException">No target in all documents.</exception>
    public static EvaluationResult Evaluate(CausalLM model, IReadOnlyList<TokenSequence> documents, ComputeOptions? compute = null, CancellationToken cancellationToken = default)
    {
        TensorMemory.KeepFreedMemory();
        var total = default(TokenScore);
        foreach (var document in documents)
        {
            using var batch = new TokenBatch([document], model.Device);
            total += model.Evaluate(batch, compute, cancellationToken);
        }
        if (total.TargetCount == 0) throw new ArgumentException($"There is nothing to evaluate: {documents.Count} documents without a single target token.", nameof(documents));
        return new EvaluationResult(total.LossSum / total.TargetCount, (double)total.Correct / total.TargetCount, total.TargetCount);
    }

    private static int StepsPerEpoch(int documents, TrainingOptions options)
    {
        int microBatches = (documents + options.BatchSize - 1) / options.BatchSize;
        return (microBatches + options.GradientAccumulationSteps - 1) / options.GradientAccumulationSteps;
    }

    // The documents of each step, pass after pass without end; the last step of a pass has what is left.
    private static IEnumerable<IReadOnlyList<TokenSequence>> Windows(IReadOnlyList<TokenSequence> documents, TrainingOptions options, Random order)
    {
        TokenSequence[] pass = [.. documents];
        while (true)
        {
            if (options.Shuffle) order.Shuffle(pass);
            foreach (var window in pass.Chunk(options.BatchSize * options.GradientAccumulationSteps)) yield return window;
        }
    }

    // One optimizer step: gradients of the mean over all targets of the window, whatever micro-batch they are in.
    private static StepResult Step(CausalLM model, FusedAdamW optimizer, IReadOnlyList<TokenSequence> window, int step, double learningRate, TrainingOptions options, CancellationToken cancellationToken)
    {
        using var quiet = new CollectionPause();
        optimizer.ZeroGrad();
        long targets = window.Sum(d => d.TargetCount);
        double loss = 0;
        var updates = options.OptimizerInBackward ? new BackwardUpdates(optimizer, step, targets, learningRate) : null;
        foreach (var documents in window.Chunk(options.BatchSize))
        {
            using var batch = new TokenBatch(documents, model.Device);
            using var part = model.ForwardBackward(batch, 1.0 / Math.Max(1, targets), options.Compute, cancellationToken, updates is null ? null : updates.Update);
            loss += part.LossSum.item<double>();
        }
        double norm = updates?.GradNorm ?? optimizer.ClipGradNorm(options.MaxGradNorm);
        if (!double.IsFinite(loss) || !double.IsFinite(norm)) throw NotFinite(step, loss / Math.Max(1, targets), norm, changed: false);
        if (targets > 0 && updates is null) optimizer.Step(learningRate);
        return new StepResult(loss, targets, window.Sum(d => (long)d.Length), norm);
    }

    private static NotFiniteNumberException NotFinite(int step, double loss, double norm, bool changed)
    {
        const string Remedy = "a lower learning rate, more warmup or gradient clipping may help";
        return new NotFiniteNumberException($"Step {step + 1}: the loss is {loss} and the norm of the gradient {norm}. " + (changed
            ? $"The weights of later layers are already those of this step, which OptimizerInBackward makes layer by layer, from the last to the first: load the model anew; {Remedy}, which needs OptimizerInBackward = false."
            : step == 0 ? "No step was made yet: the weights that were loaded may be damaged."
            : $"The weights are those after step {step}; {Remedy}."));
    }

    /// <summary>The optimizer's part of a step, done while backward goes on (<see cref="TrainingOptions.OptimizerInBackward"/>).</summary>
    private sealed class BackwardUpdates(FusedAdamW optimizer, int step, long targets, double learningRate)
    {
        private double _squares;
        private bool _changed;

        public double GradNorm => Math.Sqrt(_squares);

        public void Update(Tensor lossSum, IReadOnlyList<Parameter> parameters)
        {
            double loss = lossSum.item<double>() / targets, norm = FusedAdamW.GradNorm(parameters);
            if (!double.IsFinite(loss) || !double.IsFinite(norm)) throw NotFinite(step, loss, norm, _changed);
            _squares += norm * norm;
            optimizer.StepAndFree(parameters, learningRate);
            _changed |= parameters.Count > 0;
        }
    }

    private readonly record struct StepResult(double LossSum, long Targets, long Tokens, double GradNorm);

    /// <summary>Gathers what the next report says.</summary>
    private sealed class Report(int totalSteps, int stepsPerEpoch, IProgress<TrainingProgress>? progress)
    {
        private readonly Stopwatch _clock = Stopwatch.StartNew();
        private (double Loss, long Targets) _total;
        private (double Loss, long Targets, long Tokens) _since;
        private (int Step, double Rate, double Norm) _last;

        public double TotalLoss => _total.Loss / Math.Max(1, _total.Targets);

        public EvaluationResult? LastEvaluation { get; private set; }

        public void Add(int step, StepResult result, double rate)
        {
            _total = (_total.Loss + result.LossSum, _total.Targets + result.Targets);
            _since = (_since.Loss + result.LossSum, _since.Targets + result.Targets, _since.Tokens + result.Tokens);
            _last = (step, rate, result.GradNorm);
        }

        public void Pause() => _clock.Stop();

        public void Evaluated(EvaluationResult score)
        {
            LastEvaluation = score;
            Send(score);
        }

        /// <summary>Reports the steps since the last report, if there are any, or an evaluation.</summary>
        public void Send(EvaluationResult? evaluation = null)
        {
            _clock.Stop();
            if (_since.Tokens > 0 || evaluation is not null)
                progress?.Report(new TrainingProgress(_last.Step, totalSteps, (double)_last.Step / stepsPerEpoch, _since.Loss / Math.Max(1, _since.Targets), _last.Rate, _last.Norm,
                    _since.Tokens / Math.Max(1e-9, _clock.Elapsed.TotalSeconds), PeakMemory(), evaluation));
            _since = default;
            _clock.Restart();
        }

        private static long PeakMemory() => TensorMemory.PeakBytes > 0 ? TensorMemory.PeakBytes : TensorMemory.PeakResidentBytes;
    }

    /// <summary>Early stopping, and the weights to go back to.</summary>
    private sealed class BestWeights(CausalLM model, TrainingOptions options) : IDisposable
    {
        private readonly Dictionary<string, Tensor> _copies = [];
        private int _worse;

        public EvaluationResult? Score { get; private set; }

        public bool OutOfPatience => _worse >= (options.EarlyStoppingPatience ?? int.MaxValue);

        public void Consider(EvaluationResult score)
        {
            if (Score is not null && !(score.Loss < Score.Loss))
            {
                _worse++;
                return;
            }
            (Score, _worse) = (score, 0);
            if (!options.LoadBestModelAtEnd) return;
            Dispose();
            foreach (var (name, p) in model.named_parameters())
                if (p.requires_grad) _copies[name] = p.detach().clone().DetachFromDisposeScope();
        }

        public bool Restore()
        {
            if (_copies.Count == 0) return false;
            using var noGrad = no_grad();
            foreach (var (name, p) in model.named_parameters())
                if (_copies.TryGetValue(name, out var copy)) p.copy_(copy);
            return true;
        }

        public void Dispose()
        {
            foreach (var copy in _copies.Values) copy.Dispose();
            _copies.Clear();
        }
    }
}
