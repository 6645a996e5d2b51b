using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using MiniSeq.Models;
using MiniSeq.Training;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>The command <c>loss-curve</c>.</summary>
internal sealed class LossCurveCommand
{
    internal const string Folder = "samples/LongDocumentSummarization/data", PromptTemplate = "{input}\n\nSummary:\n"; // the sample's, and the ML.NET pipeline's
    private const int HeldOutEvery = 7, HeldOutAt = 3;

    private readonly Option<string> _data = new("--data") { DefaultValueFactory = _ => Folder + "/sqlite_docs.jsonl", Description = "one JSON object a line, with document and summary" };
    private readonly Option<string> _tokenizer = new("--tokenizer") { DefaultValueFactory = _ => Folder, Description = "folder of tokenizer.json" };
    private readonly Option<int> _steps = Options.Number("--steps", 300, "training steps, a document each");
    private readonly Option<int> _window = Options.Number("--window", 25, "steps whose loss is averaged");
    private readonly Option<int> _maxLength = Options.Number("--max-length", 2048, "tokens at which a document is cut", least: 64);
    private readonly Option<int> _threads = Options.Threads();
    private readonly Option<FileInfo?> _json = Options.Json();

    public static Command Create()
    {
        var it = new LossCurveCommand();
        var command = new Command("loss-curve", """
            Trains the sample's small new model twice, in float32 and in bfloat16: from the same weights (in bfloat16 rounded), over the same documents in
            the same order, with the sample's options. Prints the mean loss of a token over windows of steps, and the loss of held-out documents at the end.
            """) { it._data, it._tokenizer, it._steps, it._window, it._maxLength, it._threads, it._json };
        command.SetAction(it.Run);
        return command;
    }

    private void Run(ParseResult p)
    {
        Turns.Prepare(p.GetValue(_threads));
        var encoder = Encoder(p.GetValue(_tokenizer)!, p.GetValue(_maxLength));
        var (train, heldOut) = Read(p.GetValue(_data)!, encoder);
        using var start = NewModel();
        var (wide, wideEnd) = Train(start, ScalarType.Float32, train, heldOut, p);
        var (narrow, narrowEnd) = Train(start, ScalarType.BFloat16, train, heldOut, p);
        var windows = wide.Zip(narrow, (w, n) => new { w.Step, Float32 = w.Loss, Bfloat16 = n.Loss, Ratio = n.Loss / w.Loss }).ToList();
        var worst = windows.MaxBy(w => Math.Abs(w.Ratio - 1))!;
        Report.Table(["steps to", "loss float32", "loss bfloat16", "bfloat16 / float32"],
            windows.Select(w => new[] { Report.Cell(w.Step), Report.Cell(w.Float32, 4), Report.Cell(w.Bfloat16, 4), Report.Cell(w.Ratio, 4) }));
        Console.WriteLine($"largest deviation: {Percent(worst.Ratio - 1)}, in the window that ends with step {worst.Step}");
        Console.WriteLine($"held-out loss at the end: float32 {Report.Cell(wideEnd.Loss, 4)}, bfloat16 {Report.Cell(narrowEnd.Loss, 4)}, {Percent((narrowEnd.Loss / wideEnd.Loss) - 1)}");
        Report.Write(p.GetValue(_json), Report.Json(new
        {
            Device = Report.Device(),
            MaxLength = p.GetValue(_maxLength),
            Documents = train.Count,
            Windows = windows,
            LargestDeviation = Math.Abs(worst.Ratio - 1),
            HeldOut = new { Float32 = wideEnd.Loss, Bfloat16 = narrowEnd.Loss },
        }));
    }

    internal static DocumentEncoder Encoder(string tokenizer, int maxLength) => new(HuggingFaceTokenizer.FromPretrained(tokenizer), PromptTemplate, maxLength);

    // The sample's.
    private static CausalLM NewModel()
    {
        random.manual_seed(1);
        return new CausalLM(DecoderConfig.Llama(vocabSize: 4096, hiddenSize: 128, intermediateSize: 352, layers: 2, heads: 2, kvHeads: 1, tieWordEmbeddings: true) with { MaxPositionEmbeddings = 32768 });
    }

    private (List<TrainingProgress> Windows, EvaluationResult End) Train(CausalLM start, ScalarType dtype, List<TokenSequence> train, List<TokenSequence> heldOut, ParseResult p)
    {
        using var model = new CausalLM(start.Config, dtype);
        using (no_grad())
            foreach (var (own, given) in model.parameters().Zip(start.parameters())) own.copy_(given);
        var reports = new Reports(Shape.Name(dtype));
        var result = Trainer.Train(model, train, heldOut, new TrainingOptions
        {
            MaxSteps = p.GetValue(_steps),
            LearningRate = 1e-2,
            LrSchedulerType = LrSchedulerType.Cosine,
            WarmupRatio = 0.1,
            WeightDecay = 0.01,
            LoggingSteps = p.GetValue(_window),
            EvalSteps = int.MaxValue, // at the end
        }, reports);
        return (reports.Windows, result.FinalEvaluation!);
    }

    internal static (List<TokenSequence> Train, List<TokenSequence> HeldOut) Read(string path, DocumentEncoder encoder)
    {
        if (!File.Exists(path)) throw new FileNotFoundException($"There is no data at '{path}': run in the repository, or give --data and --tokenizer.", path);
        var (train, heldOut) = (new List<TokenSequence>(), new List<TokenSequence>());
        foreach (var (number, line) in File.ReadLines(path).Where(l => !string.IsNullOrWhiteSpace(l)).Index())
            if (Encoded(line, encoder, $"'{path}', line {number + 1}") is { } document) (number % HeldOutEvery == HeldOutAt ? heldOut : train).Add(document);
        return (train, heldOut);
    }

    // Null where the summary alone is longer than texts may be, as in the pipeline.
    private static TokenSequence? Encoded(string line, DocumentEncoder encoder, string place)
    {
        try
        {
            using var json = JsonDocument.Parse(line);
            string Text(string name) => json.RootElement.GetProperty(name).GetString()!;
            return encoder.Encode(Text("document"), Text("summary"), completionOnlyLoss: false);
        }
        catch (SequenceTooLongException)
        {
            return null;
        }
        catch (Exception e) when (e is JsonException or KeyNotFoundException)
        {
            throw new InvalidDataException($"{place}: not a JSON object with the texts document and summary.", e);
        }
    }

    private static string Percent(double share) => share.ToString("+0.00%;-0.00%", CultureInfo.InvariantCulture);

    /// <summary>The reports that close a window, as they come.</summary>
    private sealed class Reports(string name) : IProgress<TrainingProgress>
    {
        public List<TrainingProgress> Windows { get; } = [];

        public void Report(TrainingProgress value)
        {
            if (value.Loss == 0) return; // nothing but an evaluation
            Windows.Add(value);
            Console.Error.WriteLine($"{name}: step {value.Step}/{value.TotalSteps}, loss {value.Loss:F4}, {value.TokensPerSecond:F0} tokens/s");
        }
    }
}
