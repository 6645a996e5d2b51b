using System.CommandLine;
using System.Diagnostics;
using System.Globalization;
using System.Text.Json.Nodes;
using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>optimizer</c>: what each way of keeping and applying the optimizer holds over a whole step, and how long its part takes.</summary>
internal sealed class OptimizerCommand
{
    private const double LearningRate = 1e-4;

    private static readonly (string Name, TrainingOptions Options)[] s_variants =
    [
        ("float32 state", new TrainingOptions { MaxGradNorm = 0 }),
        ("bfloat16 state", new TrainingOptions { MaxGradNorm = 0, OptimizerState = OptimizerStateType.BFloat16 }),
        ("in backward", new TrainingOptions { MaxGradNorm = 0, OptimizerInBackward = true }),
        ("bfloat16 state, in backward", new TrainingOptions { MaxGradNorm = 0, OptimizerState = OptimizerStateType.BFloat16, OptimizerInBackward = true }),
    ];

    private readonly Option<int> _hidden = Options.Number("--hidden", 1024, "hidden size");
    private readonly Option<int> _intermediate = Options.Number("--intermediate", 4096, "intermediate size of the MLP");
    private readonly Option<int> _layers = Options.Number("--layers", 6, "decoder layers");
    private readonly Option<int> _heads = Options.Number("--heads", 16, "query heads");
    private readonly Option<int> _kvHeads = Options.Number("--kv-heads", 8, "key/value heads");
    private readonly Option<int> _vocab = Options.Number("--vocab", 32000, "vocabulary size");
    private readonly Option<int> _seq = Options.Number("--seq", 256, "tokens of a document");
    private readonly Option<int> _threads = Options.Threads();
    private readonly Option<int> _rounds = Options.Number("--rounds", 3, "times each variant gets its turn");
    private readonly Option<int> _steps = Options.Number("--steps", 3, "steps timed in a turn, after one that makes the state");
    private readonly Option<string[]> _dtype = new("--dtype") { DefaultValueFactory = _ => ["float32"], AllowMultipleArgumentsPerToken = true, Description = "float32, bfloat16 or both" };
    private readonly Option<FileInfo?> _output = Options.Json();

    private OptimizerCommand()
    {
    }

    /// <summary>The command, ready to be part of a program.</summary>
    public static Command Create()
    {
        var it = new OptimizerCommand();
        var command = new Command("optimizer", "Memory of a whole training step with the optimizer's state in float32 or bfloat16, after backward or in it, and the time of the optimizer's part (medians, all in this process).")
        {
            it._hidden, it._intermediate, it._layers, it._heads, it._kvHeads, it._vocab, it._seq, it._threads, it._rounds, it._steps, it._dtype, it._output,
        };
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_threads));
        var shape = new Shape
        {
            Hidden = p.GetValue(_hidden),
            Intermediate = p.GetValue(_intermediate),
            Layers = p.GetValue(_layers),
            Heads = p.GetValue(_heads),
            KvHeads = p.GetValue(_kvHeads),
            Vocab = p.GetValue(_vocab),
            Seq = p.GetValue(_seq),
            Batch = 1,
        };
        ScalarType[] dtypes = [.. p.GetValue(_dtype)!.SelectMany(d => d.Split(',')).Select(Shape.ParseDType)];
        var variants = Measure(shape, dtypes, p.GetValue(_rounds), p.GetValue(_steps));
        Report.Table([" variant", " dtype", "parameters, million", "state MB", "peak of all tensors over a step MB", "optimizer, ms a step"], variants.Select(v => new[]
        {
            $"{v["name"]}", $"{v["dtype"]}", Report.Cell(v["parameters"], 1, 1e6), Report.Cell(v["stateBytes"], 0, 1 << 20), Report.Cell(v["peakTensorBytes"], 0, 1 << 20), Report.Cell(v["optimizerMilliseconds"], 1),
        }));
        Report.Write(p.GetValue(_output), Report.Json(new { shape, device = Report.Device(), threads = get_num_threads(), variants }));
    }

    /// <summary>One turn of a variant.</summary>
    /// <param name="Parameters">Trained numbers.</param>
    /// <param name="StateBytes">Of the optimizer.</param>
    /// <param name="PeakBytes">Largest bytes of all tensors over a whole step: weights, state, gradients and activations.</param>
    /// <param name="Seconds">The optimizer's part of each step.</param>
    /// <param name="Loss">Of the last step.</param>
    private sealed record Turn(long Parameters, long StateBytes, long PeakBytes, double[] Seconds, double Loss);

    private static List<JsonObject> Measure(Shape shape, ScalarType[] dtypes, int rounds, int steps)
    {
        var turns = dtypes.SelectMany(d => s_variants.Select(v => (DType: d, Variant: v))).ToDictionary(k => k, _ => new List<Turn>());
        for (int round = 0; round < rounds; round++)
            foreach (var (key, list) in turns)
            {
                list.Add(Take(shape, key.DType, key.Variant.Options, steps));
                Console.Error.WriteLine($"round {round + 1}/{rounds}: {key.Variant.Name} {Shape.Name(key.DType)}, loss {list[^1].Loss.ToString("F4", CultureInfo.InvariantCulture)}");
            }
        return [.. turns.Select(t => new JsonObject
        {
            ["name"] = t.Key.Variant.Name,
            ["dtype"] = Shape.Name(t.Key.DType),
            ["parameters"] = t.Value[0].Parameters,
            ["stateBytes"] = t.Value[0].StateBytes,
            ["peakTensorBytes"] = t.Value.Max(turn => turn.PeakBytes),
            ["optimizerMilliseconds"] = Math.Round(1000 * Report.Median([.. t.Value.SelectMany(turn => turn.Seconds)]), 2),
            ["loss"] = t.Value[0].Loss,
        })];
    }

    private static Turn Take(Shape shape, ScalarType dtype, TrainingOptions options, int steps)
    {
        long before = TensorMemory.LiveBytes;
        random.manual_seed(1);
        using var model = new CausalLM(shape.Config, dtype);
        using var optimizer = new FusedAdamW(model.parameters(), options);
        using var batch = new TokenBatch(shape.Documents(shape.Seq));
        double loss = 0;
        Step();
        TensorMemory.ResetPeak();
        double[] seconds = [.. Enumerable.Range(0, steps).Select(_ => Step())];
        return new Turn(model.parameters().Sum(p => p.numel()), optimizer.StateBytes, TensorMemory.PeakBytes - before, seconds, loss);

        double Step()
        {
            var clock = new Stopwatch();
            void Timed(Action body)
            {
                clock.Start();
                body();
                clock.Stop();
            }
            GradientsCompleted? completed = options.OptimizerInBackward ? (_, parameters) => Timed(() => optimizer.StepAndFree(parameters, LearningRate)) : null;
            using (var sum = model.ForwardBackward(batch, 1.0 / batch.TargetCount, new ComputeOptions(Recompute: RecomputePolicy.Full), default, completed)) loss = sum.Mean;
            if (completed is null) Timed(() => optimizer.Step(LearningRate));
            optimizer.ZeroGrad();
            return clock.Elapsed.TotalSeconds;
        }
    }
}
