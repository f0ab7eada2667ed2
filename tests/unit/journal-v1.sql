-- A journal as version 1 wrote it: two jobs that wait, one that ran, two that ended.
BEGIN TRANSACTION;
CREATE TABLE content (
            seq INTEGER PRIMARY KEY,
            bytes BLOB NOT NULL,
            crc INTEGER NOT NULL
        ) STRICT;
INSERT INTO "content" VALUES(1,X'7B2270726F6D7074223A226669727374227D',2378145599);
INSERT INTO "content" VALUES(2,X'7B2270726F6D7074223A227365636F6E64227D',2729216314);
INSERT INTO "content" VALUES(3,X'7B2270726F6D7074223A227468697264227D',84452347);
INSERT INTO "content" VALUES(4,X'7B2266696E616C223A20347D',3256250501);
INSERT INTO "content" VALUES(5,X'7B2266696E616C223A20357D',3675079108);
CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO "fact" VALUES('fact','{"a": 1}');
CREATE TABLE job (
            seq INTEGER PRIMARY KEY,
            client TEXT NOT NULL,
            id TEXT NOT NULL,
            kind TEXT NOT NULL,
            digest BLOB NOT NULL,
            priority INTEGER NOT NULL,
            deadline_s REAL,
            boot_id TEXT NOT NULL,
            boottime REAL NOT NULL,
            wall REAL NOT NULL,
            synced INTEGER NOT NULL,
            ran REAL NOT NULL,
            replies TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'ended')),
            starts INTEGER NOT NULL DEFAULT 0,
            deaths INTEGER NOT NULL DEFAULT 0,
            last_death TEXT,
            ended_ran REAL,
            outcome TEXT,
            replaced INTEGER NOT NULL DEFAULT 0,
            sends INTEGER NOT NULL DEFAULT 0
        ) STRICT;
INSERT INTO "job" VALUES(1,'','waits','text',X'A7937B64B8CAA58F03721BB6BACF5C78CB235FEBE0E70B1B84CD99541461A08E',9,1.5,'boot',12.5,1000000000.0,1,0.25,'[["edged/reply/waits", "00ff"]]','queued',0,0,NULL,NULL,NULL,0,0);
INSERT INTO "job" VALUES(2,'c','died','text',X'16367AACB67A4A017C8DA8AB95682CCB390863780F7114DDA0A0E0C55644C7C4',5,NULL,'boot',12.5,1000000000.0,1,0.25,'[["edged/reply/died", null]]','queued',1,1,'signal',NULL,NULL,0,0);
INSERT INTO "job" VALUES(3,'c','runs','text',X'B1E99324505BD32DA0E1F85DCF5E19A09DB0481E8A15F62C41EB320304A8E927',5,NULL,'boot',12.5,1000000000.0,1,0.25,'[["edged/reply/runs", null]]','running',1,0,NULL,NULL,NULL,0,0);
INSERT INTO "job" VALUES(4,'c','ended','text',X'DC81B1D371A4072BE7FCFC3E1939F5BDDAE8BDC168846A50A78FACE975B9AF63',5,NULL,'boot',12.5,1000000000.0,1,0.25,'[["edged/reply/ended", null]]','ended',0,0,NULL,0.0,'completed',0,1);
INSERT INTO "job" VALUES(5,'c','sent','text',X'1774B8EEBDEC58C5F11998669E983F81E3D2C1D1A63649113096DDEF143A7C2B',5,NULL,'boot',12.5,1000000000.0,1,0.25,'[["edged/reply/sent", null]]','ended',0,0,NULL,0.0,'failed',0,1);
CREATE TABLE meta (
            one INTEGER PRIMARY KEY CHECK (one = 1),
            ran REAL NOT NULL,
            next_seq INTEGER NOT NULL
        ) STRICT;
INSERT INTO "meta" VALUES(1,0.0,6);
CREATE TABLE outbox (
            row INTEGER PRIMARY KEY,
            topic TEXT NOT NULL,
            correlation BLOB
        ) STRICT;
INSERT INTO "outbox" VALUES(67108864,'edged/reply/ended',NULL);
CREATE UNIQUE INDEX job_name ON job (client, id);
CREATE INDEX job_ended ON job (ended_ran) WHERE ended_ran IS NOT NULL;
COMMIT;
PRAGMA application_id = 1701078884;
PRAGMA user_version = 1;
