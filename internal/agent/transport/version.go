package transport

// Protocol is the version of the agent protocol that both ends of this build speak. It rises with what an older end would not
// understand or, worse, pass over: a request, or a field of Config that must be obeyed.
//
//	1: hello, configure, output, watch, exec, container, accept, stdin, signal, shutdown
//	2: modules, put_files, get_files, stat_file, sync_time; Config's tmpfs, sysctls, volumes, ntp_servers, dns_options, provision; rlimits
const Protocol = 2

// OldestProtocol is the oldest version of an agent that a host still works with: one in a machine that has run since before the daemon
// was upgraded, or in a snapshot.
const OldestProtocol = 1
