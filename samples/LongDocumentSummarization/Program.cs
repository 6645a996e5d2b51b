// Fine-tunes a Llama-like model to summarize long documents, in an ML.NET pipeline.
using System.CommandLine;
using System.Globalization;
using System.Text.RegularExpressions;
using LongDocumentSummarization;
using Microsoft.ML;
using MiniSeq.Layers;
using MiniSeq.MLNet;
using MiniSeq.Models;
using MiniSeq.Training;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
string shipped = Path.Combine(AppContext.BaseDirectory, "data");
var modelOption = new Option<string?>("--model") { Description = "folder of a Hugging Face checkpoint to start from; without it, a small new model" };
var dataOption = new Option<string>("--data") { DefaultValueFactory = _ => Path.Combine(shipped, "sqlite_docs.jsonl"), Description = "one JSON object a line, with document and summary" };
var maxLengthOption = new Option<int?>("--max-length") { Description = "most tokens of a document with its summary; longer documents are cut" };
var stepsOption = new Option<int?>("--steps") { Description = "training steps, a document each" };
var loraOption = new Option<int?>("--lora") { Description = "rank of a LoRA adapter to train in place of all weights; with --model" };
var quickOption = new Option<bool>("--quick") { Description = "a short run, to see that everything works" };
var command = new RootCommand("Fine-tunes a causal language model on long documents and their summaries.") { modelOption, dataOption, maxLengthOption, stepsOption, loraOption, quickOption };
command.SetAction(p => Run(p.GetValue(modelOption), p.GetValue(dataOption)!, p.GetValue(maxLengthOption), p.GetValue(stepsOption), p.GetValue(loraOption), p.GetValue(quickOption)));
try
{
    return command.Parse(args).Invoke(new InvocationConfiguration { EnableDefaultExceptionHandler = false });
}
catch (Exception e) when (e is IOException or InvalidDataException or ArgumentException or NotSupportedException or NotFiniteNumberException)
{
    Console.Error.WriteLine(Plain(e.Message));
    return 1;
}

// .NET adds the names of parameters, which a command line does not have.
static string Plain(string message) => Regex.Replace(message.Split('\n')[0].TrimEnd(), @"( \(Parameter '\w+'\))+$", "");

void Run(string? model, string dataFile, int? maxLength, int? steps, int? lora, bool quick)
{
    if (steps <= 0) throw new ArgumentException($"--steps is {steps}; it must be positive.");
    TensorMemory.StartCounting(); // exact peaks, in the progress and below
    var (train, heldOut) = Documents.Read(dataFile);
    if (quick) (train, heldOut) = ([.. train.OrderBy(a => a.Document.Length).Take(8)], [.. heldOut.OrderBy(a => a.Document.Length).Take(2)]);
    Console.WriteLine($"{train.Count} documents to learn from, {heldOut.Count} held out.");

    var mlContext = new MLContext(seed: 1);
    mlContext.Log += (_, e) =>
    {
        if (e.Source.StartsWith("MiniSeq", StringComparison.Ordinal) && e.Kind != Microsoft.ML.Runtime.ChannelMessageKind.Trace) Console.WriteLine($"  {e.RawMessage}");
    };
    var trainingRows = mlContext.Data.LoadFromEnumerable(train);
    var heldOutRows = mlContext.Data.LoadFromEnumerable(heldOut);

    var options = new FineTuneOptions
    {
        InputColumnName = nameof(Article.Document),
        LabelColumnName = nameof(Article.Summary),
        OutputColumnName = nameof(SummarizedArticle.GeneratedText),
        MaxLength = maxLength,
        ValidationSet = heldOutRows,
        Training = new TrainingOptions
        {
            MaxSteps = steps ?? (quick ? 8 : 80),
            LearningRate = model is null ? 1e-2 : lora is null ? 1e-4 : 1e-3,
            LrSchedulerType = LrSchedulerType.Cosine,
            WarmupRatio = 0.1,
            WeightDecay = 0.01,
            LoggingSteps = quick ? 2 : 5,
            EvalSteps = int.MaxValue, // at the start and at the end
            EvalOnStart = true,
        },
        Generation = new GenerationOptions { MaxNewTokens = 60, DoSample = model is null, Temperature = 0.7, TopP = 0.9, Seed = 1 },
    };
    if (lora is { } rank) options.Lora = new LoraConfig { R = rank, LoraAlpha = 2 * rank };
    if (model is not null) options.Model = model;
    else
    {
        options.Tokenizer = HuggingFaceTokenizer.FromPretrained(shipped);
        options.Config = DecoderConfig.Llama(vocabSize: 4096, hiddenSize: 128, intermediateSize: 352, layers: 2, heads: 2, kvHeads: 1, tieWordEmbeddings: true) with { MaxPositionEmbeddings = 32768 };
        options.CompletionOnlyLoss = false; // a new model has all of the language to learn
    }

    var pipeline = mlContext.Transforms.CopyColumns("Name", nameof(Article.Title)).Append(mlContext.MiniSeq().FineTune(options));
    var fitted = pipeline.Fit(trainingRows);
    using var transformer = mlContext.MiniSeq().FromModel(fitted);

    var metrics = mlContext.MiniSeq().Evaluate(heldOutRows, transformer);
    Console.WriteLine($"Held-out summaries after training: loss {metrics.Loss:F3}, perplexity {metrics.Perplexity:F1}, token accuracy {metrics.TokenAccuracy:P1} over {metrics.TokenCount} tokens.");

    var encoder = new DocumentEncoder(transformer.Tokenizer, options.PromptTemplate, maxLength ?? transformer.Model.Config.MaxPositionEmbeddings);
    MemoryComparison.Print(transformer.Model, train.Select(a => Encoded(encoder, a, options.CompletionOnlyLoss)).OfType<TokenSequence>().MaxBy(s => s.Length)!);

    string folder = Directory.CreateTempSubdirectory("summarizer-").FullName, file = Path.Combine(folder, "summarizer.zip");
    mlContext.MiniSeq().Save(fitted, trainingRows.Schema, file);
    Console.WriteLine($"\nSaved: {string.Join(", ", Directory.GetFileSystemEntries(folder).Select(Path.GetFileName))} in {folder}");

    var loaded = mlContext.MiniSeq().Load(file, out _);
    using var engine = mlContext.Model.CreatePredictionEngine<Article, SummarizedArticle>(loaded);
    var article = heldOut.MinBy(a => a.Document.Length)!;
    Console.WriteLine($"Loaded it again. \"{article.Title}\", held out, {article.Document.Length:N0} characters, in the model's words:\n{engine.Predict(article).GeneratedText}");
}

// Null where the summary alone is longer than the model's texts may be: such rows are not learned from either.
static TokenSequence? Encoded(DocumentEncoder encoder, Article article, bool completionOnlyLoss)
{
    try
    {
        return encoder.Encode(article.Document, article.Summary, completionOnlyLoss);
    }
    catch (SequenceTooLongException)
    {
        return null;
    }
}
