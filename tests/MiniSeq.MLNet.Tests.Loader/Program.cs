using Microsoft.ML;

// A process that knows ML.NET only: loads the pipeline ARGS[0] and prints, in lines of JSON, what it writes for each further argument.
var context = new MLContext();
var model = context.Model.Load(args[0], out _);
var rows = context.Data.LoadFromEnumerable(args[1..].Select(text => new Row { Document = text, Summary = "" }));
foreach (var row in context.Data.CreateEnumerable<Result>(model.Transform(rows), reuseRowObject: false))
    Console.WriteLine(System.Text.Json.JsonSerializer.Serialize(row.GeneratedText));

internal sealed class Row
{
    public string Document { get; set; } = "";

    public string Summary { get; set; } = "";
}

internal sealed class Result
{
    public string GeneratedText { get; set; } = "";
}
