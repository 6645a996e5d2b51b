using System.CommandLine;
using MiniSeq.Bench;

// Another process of this program (Worker.Start): no command line to parse.
if (args is ["worker", var order]) return Worker.Run(order);

var root = new RootCommand("Measures MiniSeqMLNet against the plain TorchSharp forms, and checks it against reference numbers.")
{
    StepCommand.Create(),
    LongestCommand.Create(),
    GrowthCommand.Create(),
    ProfileCommand.Create(),
    AttentionCommand.Create(),
    HeadCommand.Create(),
    LossCurveCommand.Create(),
    FilterCommand.Create(),
    OptimizerCommand.Create(),
    PlanCommand.Create(),
    ReferenceCommand.Create(),
};
try
{
    var parsed = root.Parse(args);
    int code = parsed.Invoke(new InvocationConfiguration { EnableDefaultExceptionHandler = false });
    return parsed.Errors.Count > 0 ? 2 : code;
}
catch (Exception e) when (e is ArgumentException or InvalidDataException or InvalidOperationException or IOException or UnauthorizedAccessException)
{
    Console.Error.WriteLine(e.Message);
    return 2; // 1 is a difference that was measured
}
