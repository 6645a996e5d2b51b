using System.CommandLine;
using System.Globalization;
using MiniSeq.Layers;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>filter</c>.</summary>
internal sealed class FilterCommand
{
    private readonly Option<string> _data = new("--data") { DefaultValueFactory = _ => LossCurveCommand.Folder + "/sqlite_docs.jsonl", Description = "one JSON object a line, with document and summary" };
    private readonly Option<string> _tokenizer = new("--tokenizer") { DefaultValueFactory = _ => LossCurveCommand.Folder, Description = "folder of tokenizer.json" };
    private readonly Option<int> _steps = Options.Number("--steps", 300, "training steps before, a document each");
    private readonly Option<int> _maxLength = Options.Number("--max-length", 2048, "tokens at which a document is cut", least: 64);
    private readonly Option<int> _hidden = Options.Number("--hidden", 512, "hidden size");
    private readonly Option<int> _vocab = Options.Number("--vocab", 4096, "vocabulary size, not below the tokenizer's");
    private readonly Option<int> _rounds = Options.Rounds(5);
    private readonly Option<int> _threads = Options.Threads();
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new FilterCommand();
        var command = new Command("filter", """
            The gradient filter of the LM head (Cut Cross-Entropy's) on a model that has learned something: trains a new one in bfloat16, then runs head and
            loss over a held-out document, forward and backward, exact and with thresholds, taking turns. Prints medians, the tokens of the vocabulary that
            were kept, and the error of both gradients, norm of the difference over norm.
            """) { it._data, it._tokenizer, it._steps, it._maxLength, it._hidden, it._vocab, it._rounds, it._threads, it._json };
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_threads));
        var (train, heldOut) = LossCurveCommand.Read(p.GetValue(_data)!, LossCurveCommand.Encoder(p.GetValue(_tokenizer)!, p.GetValue(_maxLength)));
        random.manual_seed(1);
        int hidden = p.GetValue(_hidden);
        using var model = new CausalLM(DecoderConfig.Llama(p.GetValue(_vocab), hidden, 3 * hidden, layers: 2, heads: hidden / 64, kvHeads: hidden / 64), ScalarType.BFloat16);
        var trained = Trainer.Train(model, train, heldOut, new TrainingOptions { MaxSteps = p.GetValue(_steps), LearningRate = 2e-3, WarmupRatio = 0.1, LoggingSteps = int.MaxValue, EvalSteps = int.MaxValue });
        Console.WriteLine($"loss of held-out documents after {trained.Steps} steps: {Report.Cell(trained.FinalEvaluation!.Loss, 3)} nats a token");
        var document = heldOut.MaxBy(d => d.Length)!;
        using var scope = NewDisposeScope();
        using var noGrad = no_grad();
        using var batch = new TokenBatch([document]);
        var rows = LinearCrossEntropy.ValidRows(batch.Targets, model.Config.VocabSize);
        var (x, labels) = (model.HeadInput(batch).index_select(0, rows), batch.Targets.index_select(0, rows));
        double?[] thresholds = [null, Math.Pow(2, -16), Math.Pow(2, -12), Math.Pow(2, -8)];
        var gradients = Array.ConvertAll(thresholds, t => Gradients(model.Head, x, labels, t));
        var measured = Turns.Run(p.GetValue(_rounds), [.. thresholds.Select(t => (Func<double[]>)(() => [Turns.Seconds(() => Gradients(model.Head, x, labels, t))]))]);
        var results = thresholds.Select((t, i) => new
        {
            Threshold = t,
            Ms = measured[i].Seconds[0] * 1e3,
            Speed = measured[0].Seconds[0] / measured[i].Seconds[0],
            Kept = gradients[i].Weight.abs().sum(dim: 1).ne(0).sum().item<long>(),
            InputError = Off(gradients[i].Input, gradients[0].Input),
            WeightError = Off(gradients[i].Weight, gradients[0].Weight),
        }).ToList();
        Report.Table([" threshold", "ms", "times as fast", "tokens with a gradient", "error of dX", "error of dW"], results.Select(r => new[]
        {
            r.Threshold is { } t ? $"2^{Math.Log2(t):F0}" : "exact", Report.Cell(r.Ms, 1), Report.Cell(r.Speed, 2), Report.Cell(r.Kept), Text(r.InputError), Text(r.WeightError),
        }));
        Report.Write(p.GetValue(_json), Report.Json(new { hidden, vocab = model.Config.VocabSize, rows = rows.numel(), steps = trained.Steps, loss = trained.FinalEvaluation.Loss, device = Report.Device(), results }));
    }

    private static (Tensor Input, Tensor Weight) Gradients(Projection head, Tensor x, Tensor labels, double? threshold)
    {
        using (var zero = zeros(head.Weight.shape, ScalarType.Float32)) head.Weight.grad = zero;
        var dx = empty_like(x);
        Chunking.ForEach(x.size(0), Chunking.LogitRows(Chunking.Auto, x.size(0), head.Weight.size(0), x.dtype), (start, count) =>
        {
            var (_, part) = LinearCrossEntropy.Chunk(x.narrow(0, start, count), head, labels.narrow(0, start, count), 1.0 / x.size(0), gradientFilter: threshold);
            dx.narrow(0, start, count).copy_(part!);
        });
        return (dx.to(ScalarType.Float32), head.Weight.grad!);
    }

    private static double Off(Tensor a, Tensor b) => (a - b).norm().item<float>() / b.norm().item<float>();

    private static string Text(double value) => value.ToString("0.0e+0", CultureInfo.InvariantCulture);
}
